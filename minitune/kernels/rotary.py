"""q, k and v on their way to attention: what adapters add to q and k, and rotary positions.

RoFormer, https://arxiv.org/abs/2104.09864, half-split as in `model.rotate`. The products with the frozen weights of q
and k come side by side in one tensor; in the backward pass the gradients of all three leave in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.kernels.launch import blocks, fused, jit, power_of_two, tl

HEADS = 20  # that a program goes along


def turn(qk: Tensor, xa: Tensor | None, B: Tensor | None, cos: Tensor, sin: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """q (N, H, h) and k (N, K, h), turned, each with its adapter's part.

    qk (N, (H + K) h): products with the frozen weights; xa (N, 3r): what went down in the adapters of q, k and v;
    B ((H + 2K) h, r): their ways up, one above the other; cos, sin (N, h/2) fp32.
    """
    if not fused(qk):
        return plain_turn(qk, xa, B, cos, sin, H)
    N, h = qk.shape[0], 2 * cos.shape[1]
    K = qk.shape[1] // h - H
    q, k = (qk.new_empty(N, heads, h) for heads in (H, K))
    r = 1 if B is None else B.shape[1]
    turn_kernel[(blocks(N, 16), blocks(H + K, HEADS))](
        qk, xa, B, cos, sin, q, k, N, H, K, h // 2, r, power_of_two(r, 16), B is not None,
        16, power_of_two(h // 2, 16), HEADS, num_warps=2,
    )  # fmt: skip
    return q, k


def turn_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, B: Tensor | None, cos: Tensor, sin: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the products, side by side (N, (H + 2K) h), and scale * that of q, k, v times B (N, 3r)."""
    if not fused(dq):
        return plain_turn_backward(dq, dk, dv, B, cos, sin, scale)
    (N, H, h), K = dq.shape, dk.shape[1]
    r = 1 if B is None else B.shape[1]
    dqkv = dq.new_empty(N, (H + 2 * K) * h)
    below = None if B is None else dq.new_empty(N, 3 * r)
    turn_backward_kernel[(blocks(N, 16),)](
        dq, dk, dv, B, cos, sin, dqkv, below, scale, N, H, K, h // 2, r, power_of_two(r, 16), B is not None,
        16, power_of_two(h // 2, 16), num_warps=4,
    )  # fmt: skip
    return dqkv, below


def plain_turn(qk, xa, B, cos, sin, H):
    N, h = qk.shape[0], 2 * cos.shape[1]
    wide = qk.to(torch.promote_types(qk.dtype, torch.float32))
    widths = [H * h, qk.shape[1] - H * h]
    if B is not None:
        downs, ups = xa.to(wide.dtype).chunk(3, dim=1), B[: sum(widths)].to(wide.dtype).split(widths)
        wide = wide + torch.cat([down @ up.T for down, up in zip(downs, ups, strict=False)], dim=1)
    q, k = (turned(part.view(N, -1, h), cos, sin) for part in wide.split(widths, dim=1))
    return q.to(qk.dtype), k.to(qk.dtype)


def plain_turn_backward(dq, dk, dv, B, cos, sin, scale):
    parts = [turned(x.to(torch.promote_types(x.dtype, torch.float32)), cos, -sin) for x in (dq, dk)] + [dv]
    parts = [part.flatten(1).to(dq.dtype) for part in parts]
    if B is None:
        return torch.cat(parts, dim=1), None
    ups = B.split([part.shape[1] for part in parts])
    return torch.cat(parts, dim=1), torch.cat([scale * (p @ up) for p, up in zip(parts, ups, strict=True)], dim=1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, h), each pair (x_i, x_{i + h/2}) turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@jit
def half_up_kernel(B, offset, HALF: tl.constexpr, half, R: tl.constexpr, RANKS: tl.constexpr):
    """Rows offset .. offset + half of B: (HALF, RANKS)."""
    i = tl.arange(0, HALF)
    ranks = tl.arange(0, RANKS)
    return tl.load(
        B + (offset + i)[:, None] * R + ranks[None, :], mask=(i < half)[:, None] & (ranks < R)[None, :], other=0.0
    )


@jit
def turn_kernel(
    qk, xa, B, cos, sin, q, k, N, H, K, half,
    R: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, HALF)
    ranks = tl.arange(0, RANKS)
    row = rows.to(tl.int64)[:, None]
    real = (rows < N)[:, None] & (i < half)[None, :]
    thin = (rows < N)[:, None] & (ranks < R)[None, :]
    c = tl.load(cos + row * half + i[None, :], mask=real, other=0.0)
    s = tl.load(sin + row * half + i[None, :], mask=real, other=0.0)
    begin = tl.program_id(1) * HEADS
    for head in range(begin, min(begin + HEADS, H + K)):
        at = qk + row * ((H + K) * 2 * half) + head * 2 * half + i[None, :]
        first = tl.load(at, mask=real, other=0.0).to(tl.float32)
        second = tl.load(at + half, mask=real, other=0.0).to(tl.float32)
        if ADAPTED:
            which = tl.where(head < H, 0, 1)
            down = tl.load(xa + row * (3 * R) + which * R + ranks[None, :], mask=thin, other=0.0)
            b = half_up_kernel(B, head * 2 * half, HALF, half, R, RANKS)
            first = tl.dot(down, tl.trans(b), first, input_precision="ieee")
            b = half_up_kernel(B, head * 2 * half + half, HALF, half, R, RANKS)
            second = tl.dot(down, tl.trans(b), second, input_precision="ieee")
        if head < H:
            out = q + row * (H * 2 * half) + head * 2 * half + i[None, :]
            tl.store(out, first * c - second * s, mask=real)
            tl.store(out + half, second * c + first * s, mask=real)
        else:
            out = k + row * (K * 2 * half) + (head - H) * 2 * half + i[None, :]
            tl.store(out, first * c - second * s, mask=real)
            tl.store(out + half, second * c + first * s, mask=real)


@jit
def turn_backward_kernel(
    dq, dk, dv, B, cos, sin, dqkv, below, scale, N, H, K, half,
    R: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, HALF)
    row = rows.to(tl.int64)[:, None]
    real = (rows < N)[:, None] & (i < half)[None, :]
    c = tl.load(cos + row * half + i[None, :], mask=real, other=0.0)
    s = tl.load(sin + row * half + i[None, :], mask=real, other=0.0)
    out = dqkv + row * ((H + 2 * K) * 2 * half) + i[None, :]
    below_q = turn_heads_kernel(dq, B, out, 0, H, c, s, row, real, half, R, RANKS, ADAPTED, ROWS, HALF)
    below_k = turn_heads_kernel(dk, B, out, H, K, c, s, row, real, half, R, RANKS, ADAPTED, ROWS, HALF)
    one, zero = c * 0 + 1, c * 0  # v is not turned
    below_v = turn_heads_kernel(dv, B, out, H + K, K, one, zero, row, real, half, R, RANKS, ADAPTED, ROWS, HALF)
    if ADAPTED:
        at = below + row * (3 * R) + tl.arange(0, RANKS)[None, :]
        store = (rows < N)[:, None] & (tl.arange(0, RANKS) < R)[None, :]
        tl.store(at, below_q * scale, mask=store)
        tl.store(at + R, below_k * scale, mask=store)
        tl.store(at + 2 * R, below_v * scale, mask=store)


@jit
def turn_heads_kernel(
    d, B, out, before, heads, c, s, row, real, half,
    R: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one of d (N, heads, h) back, store them behind `before` others; their sum over B."""
    i = tl.arange(0, HALF)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for head in range(0, heads):
        at = d + row * (heads * 2 * half) + head * 2 * half + i[None, :]
        first = tl.load(at, mask=real, other=0.0)
        kind = first.dtype
        first = first.to(tl.float32)
        second = tl.load(at + half, mask=real, other=0.0).to(tl.float32)
        a = (first * c + second * s).to(kind)
        b = (second * c - first * s).to(kind)
        place = (before + head) * 2 * half
        tl.store(out + place, a, mask=real)
        tl.store(out + place + half, b, mask=real)
        if ADAPTED:
            total = tl.dot(a, half_up_kernel(B, place, HALF, half, R, RANKS), total, input_precision="ieee")
            total = tl.dot(b, half_up_kernel(B, place + half, HALF, half, R, RANKS), total, input_precision="ieee")
    return total
