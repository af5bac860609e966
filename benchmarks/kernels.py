"""What each fused operation is worth: its time beside its plain twin's, at the shapes of an 8B block of 8192 tokens.

    python benchmarks/kernels.py --out kernels.json

The plain twin runs under torch.compile where that can take it, as plain PyTorch where not; so a kernel that does not
pay shows here. Share of copy: bytes that must be moved, each once, over the time, over what a device copy reaches.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from clock import copy_bandwidth, gpu_seconds
from torch import Tensor

from minitune import masters, nf4
from minitune.kernels import adamw, four_bits, low_rank, norm, rotary, softmax, swiglu
from minitune.kernels.dropout import Dropout
from minitune.log import versions

N, D, F, H, K, h, V, r = 8192, 4096, 14336, 32, 8, 128, 128256, 16


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def cases():
    """Name, bytes, the operation, its plain twin (or what PyTorch and bitsandbytes have)."""
    x, y, w, factor = draw(N, D), draw(N, D), draw(D), torch.rand(N, device="cuda")
    row = N * D * 2
    yield "norm", 4 * row, lambda: norm.norm(x, w, 1e-5, y), compiled(norm.plain_norm, x, w, 1e-5, y)
    plain = compiled(norm.plain_norm_backward, y.clone(), x, w, factor, y, False)
    yield "norm_backward", 5 * row, lambda: norm.norm_backward(y, x, w, factor, x, False), plain

    cos, sin = torch.rand(N, h // 2, device="cuda"), torch.rand(N, h // 2, device="cuda")
    qk, xa, B = draw(N, (H + K) * h), draw(N, 3 * r), draw((H + 2 * K) * h, r)
    plain = compiled(rotary.plain_turn, qk, xa, B, cos, sin, H)
    yield "turn", 2 * qk.nbytes, lambda: rotary.turn(qk, xa, B, cos, sin, H), plain
    d = [draw(N, heads, h) for heads in (H, K, K)]
    plain = compiled(rotary.plain_turn_backward, *d, B, cos, sin, 2.0)
    yield "turn_backward", 2 * sum(x.nbytes for x in d), lambda: rotary.turn_backward(*d, B, cos, sin, 2.0), plain

    gate_up, dh, A, t = draw(N, 2 * F), draw(N, F), draw(r, F), draw(N, r)
    xa, B = draw(N, 2 * r), draw(2 * F, r)
    drop = Dropout.draw(0.05, torch.device("cuda"))
    given, back = (gate_up, xa, B, A, 2.0), (dh, t, gate_up, xa, B, A, 2.0)
    moved = gate_up.nbytes + dh.nbytes
    yield "swiglu", moved, lambda: swiglu.swiglu(*given), compiled(swiglu.plain_swiglu, *given, None)
    yield "swiglu, dropout", moved, lambda: swiglu.swiglu(*given, drop), compiled(swiglu.plain_swiglu, *given, drop)
    plain = compiled(swiglu.plain_swiglu_backward, *back, None, False)
    moved += gate_up.nbytes  # what comes down in the adapters is another pass, not counted here
    yield "swiglu_backward", moved, lambda: swiglu.swiglu_backward(*back), plain
    plain = compiled(swiglu.plain_swiglu_backward, *back, drop, False)
    yield "swiglu_backward, dropout", moved, lambda: swiglu.swiglu_backward(*back, drop), plain

    A, t = draw(3 * r, D), draw(N, 3 * r)
    thin = {
        "down": (lambda: low_rank.down(x, A, 2.0, 3, drop), compiled(low_rank.plain_down, x, A, 2.0, 3, drop)),
        "up": (lambda: low_rank.up(t, A, 3, drop), compiled(low_rank.plain_up, t, A, 3, drop)),
        "gradient": (lambda: low_rank.gradient(t, x, 3, drop), compiled(low_rank.plain_gradient, t, x, 3, drop)),
    }
    for name, (ours, plain) in thin.items():
        yield f"{name} of q, k, v, dropout", row, ours, plain

    logits, labels = draw(2048, V), torch.randint(0, V, (2048,), device="cuda")
    plain = compiled(softmax.plain_cross_entropy_, logits, labels)
    yield "cross_entropy", 2 * logits.nbytes, lambda: softmax.cross_entropy_(logits, labels), plain

    with torch.device("cuda"):
        linear = nf4.NF4Linear(D, 2 * F, False, torch.bfloat16)
    linear.quantize(draw(2 * F, D))
    out, levels = draw(2 * F, D), nf4.levels(torch.device("cuda", torch.cuda.current_device()))
    moved = out.nbytes + linear.packed.nbytes + linear.absmax.nbytes
    yield "dequantize", moved, lambda: four_bits.dequantize(*linear.storage(), levels, out), linear.dense_weight

    for bits in (32, 8):
        optimizer = masters.MasterAdamW([{"params": [torch.nn.Parameter(draw(2 * F, D))]}], 1e-4, bits == 8)
        p = optimizer.param_groups[0]["params"][0]
        p.grad = draw(2 * F, D)
        optimizer.step()
        state, numbers = optimizer.state[p], torch.tensor([1.0, 1.0, 0.1, 0.001], device="cuda")
        rate = adamw.Rate(1e-4, 0.01, masters.BETAS, masters.EPS, numbers)
        given = (
            p.detach(),
            state["lower"],
            p.grad,
            *(masters.moment(state, m) for m in ("exp_avg", "exp_avg_sq")),
            rate,
        )
        moved = p.numel() * (10 + 4 * bits // 8)
        yield (
            f"adamw, {bits} bits",
            moved,
            lambda given=given: adamw.adamw_(*given),
            lambda g=given: adamw.plain_adamw_(*g),
        )


def compiled(function, *given):
    """The plain twin on these tensors, and, as `uncompiled`, without a compiler."""
    fast = torch.compile(function, dynamic=False)

    def plain():
        return fast(*given)

    plain.uncompiled = lambda: function(*given)
    return plain


def time_plain(plain) -> dict:
    """A plain twin's time, and why it is that of the uncompiled one, where the compiler does not take it."""
    found = {}
    for way in (plain, getattr(plain, "uncompiled", None)):
        try:
            return {"plain_us": gpu_seconds(way) * 1e6, **found} if way else found
        except Exception as error:  # the compiler's business, not ours: say so and go on
            found["plain_failed"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-plain", action="store_true", help="the kernels alone: nothing to compile")
    options = parser.parse_args()
    copy = copy_bandwidth()
    rows = []
    for name, moved, ours, plain in cases():
        row = {"operation": name, "us": gpu_seconds(ours) * 1e6, "share_of_copy": moved / gpu_seconds(ours) / copy}
        row |= {} if options.no_plain else time_plain(plain)
        rows.append(row)
        beside = f"plain {row['plain_us']:7.0f} us" if "plain_us" in row else ""
        beside += f"  not compiled: {row['plain_failed']}" if "plain_failed" in row else ""
        print(f"{name:28} {row['us']:7.0f} us  {row['share_of_copy']:4.0%} of copy  {beside}", flush=True)
    found = {"device": torch.cuda.get_device_name(), "date": date.today().isoformat(), "versions": versions()}
    found |= {"command": "python benchmarks/kernels.py", "copy_bytes_per_second": copy, "operations": rows}
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
