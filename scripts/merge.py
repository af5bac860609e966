"""Merge a run's adapter into its base.

    python scripts/merge.py RUN [--out FOLDER] [--base dequantized|original] [--dtype bfloat16|float16|float32]

The result is a model folder for transformers, vLLM or the Hub; config.json and tokenizer are the base's own bytes.
"""

import argparse
from pathlib import Path

from minitune import errors


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="default: RUN/merged")
    parser.add_argument("--base", choices=["dequantized", "original"], default="dequantized")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: that of the base's files")
    options = parser.parse_args(arguments)
    from minitune.merge import merge

    out = options.out or options.run / "merged"
    error = merge(options.run, out, options.base, options.dtype)
    for line in error.lines(options.base):
        print(line)
    print(f"merged model in {out}")


if __name__ == "__main__":
    errors.run(main)
