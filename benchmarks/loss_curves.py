"""The losses of the built-in example's first steps by each method, to hold one machine's against another's.

    python benchmarks/loss_curves.py --out cpu.json                                        # fp32 on a CPU
    python benchmarks/loss_curves.py --out gpu.json --against cpu.json model.dtype=bfloat16   # compiled, on a GPU

Dropout is off: devices draw different numbers.
"""

import argparse
import json
import tempfile
from pathlib import Path

from minitune import files
from minitune.config import load_config
from minitune.train import train

RATES = {"full": 5e-4, "lora": 4e-3, "qlora": 4e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    curves = {method: losses(method, options.steps, options.overrides) for method in RATES}
    files.write_json(options.out, curves)
    if options.against:
        others = json.loads(options.against.read_text())
        for method, curve in curves.items():
            gaps = [abs(a - b) for a, b in zip(curve, others[method], strict=True)]
            mean = sum(a - b for a, b in zip(curve, others[method], strict=True)) / len(curve)
            print(
                f"{method:6} {others[method][0]:.4f} -> {others[method][-1]:.4f} there, "
                f"{curve[0]:.4f} -> {curve[-1]:.4f} here; "
                f"largest gap {max(gaps):.4f}, mean difference {mean:+.5f} nats"
            )


def losses(method: str, steps: int, overrides: list[str]) -> list[float]:
    """The loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"out={folder}/run", f"method={method}", f"optim.learning_rate={RATES[method]}", "eval.samples=0"]
        fixed += [f"train.max_steps={steps}", "log.every_steps=1", "log.tensorboard=false", "save.every_steps=0"]
        fixed += [] if method == "full" else ["lora.dropout=0.0"]
        train(load_config([*fixed, *overrides]))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


if __name__ == "__main__":
    main()
