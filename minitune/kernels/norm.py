"""RMSNorm, https://arxiv.org/abs/1910.07467, with the residual sum that comes before it, and its gradient.

As in `model.RMSNorm` the mean square is taken in fp32 and the weight multiplies after the cast back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.kernels.launch import fused, jit, power_of_two, tl


def norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows y (N, D) of x + added (or x), that sum (N, D), and the factor (N,) fp32 of each row."""
    if not fused(x):
        return plain_norm(x, weight, eps, added)
    (N, D), y = x.shape, torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    factor = torch.empty(N, dtype=torch.float32, device=x.device)
    size = power_of_two(D)
    norm_kernel[(N,)](x, added, weight, y, total, factor, eps, D, added is not None, size, num_warps=warps(size))
    return y, total, factor


def plain_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total = x if added is None else x + added
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().mean(-1) + eps)
    return weight.to(x.dtype) * (wide * factor[:, None]).to(x.dtype), total, factor


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, factor: Tensor, dx_too: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From dL/dy (N, D): dL/dx, plus `dx_too` that reaches x another way; y once more; and dL/dweight (D,) fp32.

    y takes the place of dy, which is not needed any more.
    """
    if not fused(x):
        return plain_norm_backward(dy, x, weight, factor, dx_too, weight_grad)
    (N, D), dx = x.shape, torch.empty_like(x)
    programs = min(N, 1024) if weight_grad else N
    dweight = torch.empty(programs, D, dtype=torch.float32, device=x.device) if weight_grad else None
    size = power_of_two(D)
    norm_backward_kernel[(programs,)](
        dy, x, weight, factor, dx_too, dx, dweight, N, D, dx_too is not None, weight_grad, size, num_warps=warps(size)
    )
    return dx, dy, None if dweight is None else dweight.sum(0)


def plain_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, factor: Tensor, dx_too: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    normed = x * factor[:, None]
    d = dy * weight.to(factor.dtype)  # dL/d normed
    dx = factor[:, None] * (d - normed * (d * normed).mean(-1, keepdim=True))
    dweight = (dy.to(factor.dtype) * normed.to(x.dtype)).sum(0) if weight_grad else None
    dx = dx if dx_too is None else dx + dx_too
    return dx.to(x.dtype), dy.copy_(weight.to(x.dtype) * normed.to(x.dtype)), dweight


def warps(size: int) -> int:
    """A thread holds sixteen numbers of a row."""
    return min(16, max(1, size // 512))


@jit
def norm_kernel(
    x, added, weight, y, total, factor, eps, D, ADDED: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * D
    at = tl.arange(0, SIZE)
    real = at < D
    t = tl.load(x + row + at, mask=real, other=0.0)
    if ADDED:
        t = (t.to(tl.float32) + tl.load(added + row + at, mask=real, other=0.0).to(tl.float32)).to(t.dtype)
        tl.store(total + row + at, t, mask=real)
    wide = t.to(tl.float32)
    f = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    w = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    tl.store(y + row + at, w * (wide * f).to(t.dtype).to(tl.float32), mask=real)
    tl.store(factor + tl.program_id(0), f)


@jit
def norm_backward_kernel(
    dy, x, weight, factor, dx_too, dx, dweight, N, D, TOO: tl.constexpr, WEIGHT: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, SIZE)
    real = at < D
    w = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    dw = tl.zeros((SIZE,), tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(n, tl.int64) * D
        f = tl.load(factor + n)
        t = tl.load(x + row + at, mask=real, other=0.0)
        normed = t.to(tl.float32) * f
        d = tl.load(dy + row + at, mask=real, other=0.0).to(tl.float32)
        rounded = normed.to(t.dtype).to(tl.float32)
        if WEIGHT:
            dw += d * rounded
        d *= w
        out = f * (d - normed * (tl.sum(d * normed, 0) / D))
        if TOO:
            out += tl.load(dx_too + row + at, mask=real, other=0.0).to(tl.float32)
        tl.store(dx + row + at, out, mask=real)
        tl.store(dy + row + at, w * rounded, mask=real)
    if WEIGHT:
        tl.store(dweight + tl.program_id(0).to(tl.int64) * D + at, dw, mask=real)
