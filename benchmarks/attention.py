"""Packed causal attention, forward and backward, by every path that is installed: how fast, and is it right?

    python benchmarks/attention.py --out attention.json [--tokens 32768] [--documents 512 2048 8192 32768]

32 query and 8 key heads of 128, bf16. The distance is that of outputs and gradients from PyTorch's plain attention on
each document by itself, the worst of the four, relative. One GPU kind's rates: causal products only, 2.5 times as
many backward.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path

import torch
from clock import gpu_seconds

from minitune.attention import CausalAttention, Documents, FlashAttention, VarlenAttention, flash_package
from minitune.log import versions

H, K, h = 32, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--documents", type=int, nargs="*", default=[512, 2048, 8192, 32768])
    options = parser.parse_args()
    paths = {"torch varlen": VarlenAttention()}
    if flash_package():
        paths[flash_package()] = FlashAttention()
    rows = []
    for length in options.documents:
        rows += measured(options.tokens, length, paths)
    found = {"device": torch.cuda.get_device_name(), "date": date.today().isoformat(), "versions": versions()}
    found |= {"command": "python benchmarks/attention.py", "paths": rows}
    options.out.write_text(json.dumps(found, indent=1))


def measured(tokens: int, length: int, paths: dict[str, torch.nn.Module]) -> list[dict[str, object]]:
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(1, tokens, n, h, **like, requires_grad=True) for n in (H, K, K))
    dy = torch.randn(1, tokens, H, h, **like)
    documents = Documents.of([length] * (tokens // length)).to(torch.device("cuda"))
    work = 2 * 2 * length / 2 * H * h * tokens  # two products, half of the pairs

    def once(core):
        y = core(q, k, v, documents)
        return (y.detach(), *torch.autograd.grad(y, (q, k, v), dy))

    right = once(CausalAttention())
    rows = []
    for name, core in paths.items():
        begun = time.time()
        found = once(core)
        torch.cuda.synchronize()
        first = time.time() - begun
        forward = gpu_seconds(lambda core=core: core(q, k, v, documents))
        backward = gpu_seconds(lambda core=core: once(core)) - forward
        away = max(
            ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, right, strict=True)
        )
        row = {"documents_of": length, "path": name, "forward_ms": forward * 1e3, "backward_ms": backward * 1e3}
        row |= {"forward_tflops": work / forward / 1e12, "backward_tflops": 2.5 * work / backward / 1e12}
        row |= {"distance": away, "first_seconds": first}
        rows.append(row)
        print(
            f"{length:6} {name:13} forward {forward * 1e3:6.2f} ms {row['forward_tflops']:4.0f} TFLOP/s  backward "
            f"{backward * 1e3:6.2f} ms {row['backward_tflops']:4.0f} TFLOP/s  distance {away:.1e}  first {first:.1f} s",
            flush=True,
        )
    return rows


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


if __name__ == "__main__":
    main()
