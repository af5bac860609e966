"""NF4 storage (see `nf4.py`) made dense in one pass: half a byte of a weight read, two written.

bitsandbytes' own operators, the plain twin, take three passes and an fp32 copy of the scales. Bits are equal: the
products and sums are the same ones, in fp32, rounded once.
"""

from __future__ import annotations

from torch import Tensor

from minitune.kernels.launch import blocks, jit, tl


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    nested_levels: Tensor,
    levels: Tensor,
    out: Tensor,
) -> None:
    """Fill out (rows, in), contiguous, from packed (rows, in/2), absmax (rows, in/64) uint8 and what they refer to."""
    n = packed.numel()
    dequantize_kernel[(blocks(n, 1024),)](
        packed, absmax, nested_absmax, offset, nested_levels, levels, out, n, 1024,
        num_warps=4, **({"enable_fp_fusion": False} if out.is_cuda else {}),
    )  # fmt: skip


@jit
def dequantize_kernel(packed, absmax, nested_absmax, offset, nested_levels, levels, out, n, SIZE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, SIZE)  # bytes, two weights each
    byte = tl.load(packed + start + at, mask=start + at < n, other=0).to(tl.int32)
    block = start // 32 + tl.arange(0, SIZE // 32)  # 64 weights each
    real = block < n // 32
    nested = tl.load(nested_levels + tl.load(absmax + block, mask=real, other=0).to(tl.int32))
    scale = nested * tl.load(nested_absmax + block // 256, mask=real, other=0.0) + tl.load(offset)
    high = tl.load(levels + (byte >> 4)).reshape(SIZE // 32, 32) * scale[:, None]
    low = tl.load(levels + (byte & 15)).reshape(SIZE // 32, 32) * scale[:, None]
    both = tl.interleave(high, low).reshape(2 * SIZE)  # the high half of a byte is the first weight
    at = tl.arange(0, 2 * SIZE)
    tl.store(out + 2 * start + at, both, mask=2 * start + at < 2 * n)
