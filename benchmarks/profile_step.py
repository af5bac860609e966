"""Where a training step's GPU time goes, by part.

    python benchmarks/profile_step.py RECIPE.toml OUT.json [--random 8b]

Thin products are those with an adapter: at the 8B shape every product with a whole weight takes over 0.2 ms.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

PARTS = [  # the first that a kernel's name fits
    ("attention", ("flash", "fmha", "attention")),
    ("SwiGLU and its adapters", ("swiglu",)),
    ("norms", ("norm_kernel", "norm_backward", "layer_norm")),
    ("rotary and q, k, v's adapters", ("turn_",)),
    ("dropout's thin products", ("down_kernel", "up_kernel", "gradient_kernel")),
    ("four bits made dense", ("dequant", "kDequantize")),
    ("softmax", ("cross_entropy", "softmax")),
    ("optimizer", ("adam", "optimizer", "kOptimizer")),
    ("copies to and from the host", ("Memcpy HtoD", "Memcpy DtoH")),
    ("copies on the device", ("Memcpy DtoD", "copy_kernel", "TensorListMetadata")),
    ("products", ("nvjet", "gemm", "cutlass", "splitKreduce", "aten::mm", "aten::addmm")),
]
THIN_MS = 0.2


def part_of(row: dict) -> str:
    for part, names in PARTS:
        if any(name.lower() in row["kernel"].lower() for name in names):
            if part == "products" and row["ms"] / row["calls"] < THIN_MS:
                return "thin products of adapters"
            return "products with whole weights" if part == "products" else part
    return "the rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--random", metavar="SIZE", help="draw the base's weights on the device, as shapes.py does")
    options = parser.parse_args()
    kernels, plan = options.out.with_suffix(".kernels.json"), options.out.with_suffix(".plan.json")
    task = {"recipe": str(options.recipe), "out": str(options.out), "steps": 6, "random": options.random}
    plan.write_text(json.dumps([task | {"profile": str(kernels)}]))
    subprocess.run([sys.executable, Path(__file__).with_name("measure.py"), plan], check=True)
    found = json.loads(options.out.read_text())
    if "failed" in found:
        raise SystemExit(found["failed"])
    found["parts"] = by_part(json.loads(kernels.read_text()))
    options.out.write_text(json.dumps(found, indent=1))
    for part, ms in found["parts"].items():
        print(f"{part:32} {ms:8.1f} ms {ms / sum(found['parts'].values()):5.1%}")


def by_part(rows: list[dict]) -> dict[str, float]:
    """Milliseconds by part, the largest first."""
    parts: dict[str, float] = {}
    for row in rows:
        parts[part_of(row)] = parts.get(part_of(row), 0.0) + row["ms"]
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    main()
