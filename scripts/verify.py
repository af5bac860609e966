"""Prove on this machine that minitune computes what it says.

    python scripts/verify.py                                      # all of it, against transformers, PEFT, bitsandbytes
    python scripts/verify.py --adapter dora                       # the whole proof of one adapter variant
    python scripts/verify.py --adapter path/to/file.py:MyLinear   # or of a class of your own, in or out of the tree

A line for each check: what, against what, the largest difference, its bound. Exit code 0 if all that ran held, 1 if
not. What needs a package that is not installed is named and counted as not run.
"""

import argparse
import sys

from minitune import errors


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", metavar="NAME|FILE.py:CLASS")
    options = parser.parse_args(arguments)
    from minitune.verify.run import verify

    sys.exit(verify(options.adapter, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    errors.run(main)
