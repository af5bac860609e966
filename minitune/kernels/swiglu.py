"""SwiGLU, https://arxiv.org/abs/2002.05202, with the adapters of gate, up and down inside it.

gate and up come as their products with the frozen weights; what their adapters add is a product of rank r, made here
on the tile at hand instead of in a pass of its own over tensors that are the largest of a block. The adapter of down
reads what comes out, and its gradient goes in, on the way. Where nothing is adapted, this is plain SwiGLU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.kernels.dropout import Dropout, column_key_kernel, kept_kernel, row_key_kernel
from minitune.kernels.launch import blocks, fused, jit, power_of_two, tl
from minitune.kernels.low_rank import dropped, product_fp32


def swiglu(
    gate_up: Tensor,
    xa: Tensor | None,
    B: Tensor | None,
    A_down: Tensor | None,
    scale: float = 1.0,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h = silu(gate) * up (N, F), and scale * dropped(h) A_down^T (N, r), which down's adapter goes on from.

    gate_up (N, 2F): products with the frozen weights; xa (N, 2r): what went down in their adapters; B (2F, r):
    their ways up, gate's above up's; A_down (r, F).
    """
    if not fused(gate_up):
        return plain_swiglu(gate_up, xa, B, A_down, scale, drop)
    (N, width), r = gate_up.shape, rank(B, A_down)
    splits, span = split(width // 2, COLUMNS, PROGRAMS // blocks(N, ROWS))
    h = gate_up.new_empty(N, width // 2)
    ha = None if A_down is None else h.new_empty(splits, N, r, dtype=torch.float32)
    swiglu_kernel[(blocks(N, ROWS), splits)](
        gate_up, xa, B, A_down, None if drop is None else drop.seeds, h, ha, N, width // 2, span,
        0 if drop is None else drop.threshold,
        r, power_of_two(r, 16), B is not None, A_down is not None, drop is not None, ROWS, COLUMNS, 3, num_warps=2,
    )  # fmt: skip
    return h, None if ha is None else (ha.sum(0) * (scale if drop is None else scale * drop.scale)).to(h.dtype)


class Backward(NamedTuple):
    """What SwiGLU's backward pass finds; None where nothing is adapted, or h not asked for."""

    dgate_up: Tensor  # (N, 2F), in the place of gate_up
    h: Tensor | None  # (N, F), once more, in the place of dh
    t: Tensor | None  # (N, 2r): scale * dL/dgate B_gate, beside the same of up
    dB: Tensor | None  # (2F, r) fp32, dL/dB
    dA_down: Tensor | None  # (r, F) fp32, dL/dA_down


def swiglu_backward(
    dh: Tensor,
    t: Tensor | None,
    gate_up: Tensor,
    xa: Tensor | None,
    B: Tensor | None,
    A_down: Tensor | None,
    scale: float = 1.0,
    drop: Dropout | None = None,
    again: bool = False,
) -> Backward:
    """From dL/dh by way of down's frozen weight (N, F) and t (N, r), what comes down in down's adapter: the gradients
    of gate and up and of the adapters' matrices that meet them here; h `again`, if something else reads it.

    What is as large as gate_up or dh takes their places, for they are not needed any more: a program reads a tile of
    all three before it writes over it, and no other program touches that tile.
    """
    if not fused(dh):
        return plain_swiglu_backward(dh, t, gate_up, xa, B, A_down, scale, drop, again)
    (N, width), r = gate_up.shape, rank(B, A_down)
    features = width // 2
    parts, span = split(N, ROWS, PROGRAMS // blocks(features, COLUMNS))
    gradients = (0 if B is None else 2 * features) + (0 if A_down is None else features)
    found = torch.empty(parts, gradients * r, dtype=torch.float32, device=dh.device)
    swiglu_backward_kernel[(blocks(features, COLUMNS), parts)](
        dh, t, gate_up, xa, B, A_down, None if drop is None else drop.seeds, found, N, features, span, gradients,
        0 if drop is None else drop.threshold, 1.0 if drop is None else drop.scale, r, power_of_two(r, 16),
        B is not None, A_down is not None, drop is not None, again, ROWS, COLUMNS, 3, num_warps=4,
    )  # fmt: skip
    found = found[0] if parts == 1 else found.sum(0)
    dB = None if B is None else found[: width * r].view(width, r)
    dA_down = None if A_down is None else found[-features * r :].view(r, features)
    return Backward(gate_up, dh if again else None, below(gate_up, B, scale), dB, dA_down)


def below(dgate_up: Tensor, B: Tensor | None, scale: float) -> Tensor | None:
    """What comes down in the adapters of gate and up, side by side: (N, 2F) -> (N, 2r)."""
    if B is None:
        return None
    out = dgate_up.new_empty(dgate_up.shape[0], 2 * B.shape[1])
    for t, dy, b in zip(out.chunk(2, dim=1), dgate_up.chunk(2, dim=1), B.chunk(2), strict=True):
        torch.addmm(t, dy, b, beta=0, alpha=scale, out=t)
    return out


def rank(B: Tensor | None, A_down: Tensor | None) -> int:
    return B.shape[1] if B is not None else A_down.shape[0] if A_down is not None else 1


ROWS, COLUMNS = 32, 64  # of the tile that a program holds
PROGRAMS = 4 * 3 * 132  # in all: four times what 132 processors hold at once


def split(n: int, tile: int, parts: int) -> tuple[int, int]:
    """Into how many parts the n rows or columns are cut that a program goes along, a tile at a time, and how long one
    is: some `parts`, of eight tiles at least. What they sum up is summed over the parts afterwards, in order."""
    parts = max(1, min(parts, blocks(n, 8 * tile)))
    span = blocks(blocks(n, tile), parts) * tile
    return blocks(n, span), span


def with_adapters(gate_up: Tensor, xa: Tensor | None, B: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up (N, F) in fp32 (or fp64), their adapters' part added."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=1)
    if B is None:
        return gate, up
    down_gate, down_up = xa.to(wide).chunk(2, dim=1)
    B_gate, B_up = B.to(wide).chunk(2)
    return gate + down_gate @ B_gate.T, up + down_up @ B_up.T


def plain_swiglu(gate_up, xa, B, A_down, scale, drop):
    gate, up = with_adapters(gate_up, xa, B)
    h = (F.silu(gate) * up).to(gate_up.dtype)
    if A_down is None:
        return h, None
    return h, (scale if drop is None else scale * drop.scale) * (dropped(h, drop, 0) @ A_down.T)


def plain_swiglu_backward(dh, t, gate_up, xa, B, A_down, scale, drop, again):
    gate, up = with_adapters(gate_up, xa, B)
    d, kept_scale = dh.to(gate.dtype), 1.0 if drop is None else drop.scale
    if A_down is not None:
        d = d + kept_scale * dropped(t.to(d.dtype) @ A_down.to(d.dtype), drop, 0)
    share, silu = torch.sigmoid(gate), F.silu(gate)
    dgate, dup, h = d * up * share * (1 + gate * (1 - share)), d * silu, (silu * up).to(dh.dtype)
    gate_up.copy_(torch.cat((dgate, dup), dim=1))
    dB = dA_down = None
    if B is not None:
        pairs = zip(gate_up.chunk(2, dim=1), xa.chunk(2, dim=1), strict=True)
        dB = torch.cat([product_fp32(dy.T, went) for dy, went in pairs])
    if A_down is not None:
        dA_down = kept_scale * product_fp32(t.T, dropped(h, drop, 0))
    return Backward(gate_up, dh.copy_(h) if again else None, below(gate_up, B, scale), dB, dA_down)


@jit
def load_up_kernel(B, columns, R: tl.constexpr, RANKS: tl.constexpr, width):
    """Some rows of a B (width, R): (columns, RANKS)."""
    ranks = tl.arange(0, RANKS)
    return tl.load(
        B + columns[:, None] * R + ranks[None, :], mask=(columns < width)[:, None] & (ranks < R)[None, :], other=0.0
    )


@jit
def swiglu_kernel(
    gate_up, xa, B, A_down, seeds, h, ha, N, F, SPAN, threshold,
    R: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, DOWN: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    row = rows.to(tl.int64)[:, None]
    here = (rows < N)[:, None]
    thin = here & (ranks < R)[None, :]
    if ADAPTED:
        xa_gate = tl.load(xa + row * (2 * R) + ranks[None, :], mask=thin, other=0.0)
        xa_up = tl.load(xa + row * (2 * R) + R + ranks[None, :], mask=thin, other=0.0)
    if DROP:
        row_key = row_key_kernel(seeds, 0, rows)
    below = tl.zeros((ROWS, RANKS), tl.float32)
    begin = tl.program_id(1) * SPAN
    for start in tl.range(begin, min(begin + SPAN, F), COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        real = here & (columns < F)[None, :]
        at = gate_up + row * (2 * F) + columns[None, :]
        g = tl.load(at, mask=real, other=0.0)
        kind = g.dtype
        g = g.to(tl.float32)
        u = tl.load(at + F, mask=real, other=0.0).to(tl.float32)
        if ADAPTED:
            b = load_up_kernel(B, columns, R, RANKS, F)
            g = tl.dot(xa_gate, tl.trans(b), g, input_precision="ieee")
            b = load_up_kernel(B + F * R, columns, R, RANKS, F)
            u = tl.dot(xa_up, tl.trans(b), u, input_precision="ieee")
        out = (g * tl.sigmoid(g) * u).to(kind)
        tl.store(h + row * F + columns[None, :], out, mask=real)
        if DOWN:
            a = tl.load(
                A_down + ranks[None, :] * F + columns[:, None],
                mask=(ranks < R)[None, :] & (columns < F)[:, None],
                other=0.0,
            )
            if DROP:
                keep = kept_kernel(row_key, column_key_kernel(columns), 0, threshold)
                out = tl.where(keep, out, 0.0)
            below = tl.dot(out, a, below, input_precision="ieee")
    if DOWN:
        part = tl.program_id(1).to(tl.int64) * N
        tl.store(ha + (part + row) * R + ranks[None, :], below, mask=thin)


@jit
def swiglu_backward_kernel(
    dh, t, gate_up, xa, B, A_down, seeds, found, N, F, SPAN, GRADIENTS, threshold, keep_scale,
    R: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, DOWN: tl.constexpr, DROP: tl.constexpr,
    AGAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    inside = (columns < F)[None, :]
    thin = (ranks < R)[None, :]
    if ADAPTED:
        b_gate = load_up_kernel(B, columns, R, RANKS, F)
        b_up = load_up_kernel(B + F * R, columns, R, RANKS, F)
        db_gate = tl.zeros((COLUMNS, RANKS), tl.float32)
        db_up = tl.zeros((COLUMNS, RANKS), tl.float32)
    if DOWN:
        a = tl.load(A_down + ranks[:, None] * F + columns[None, :], mask=(ranks < R)[:, None] & inside, other=0.0)
        da = tl.zeros((COLUMNS, RANKS), tl.float32)
    if DROP:
        column_key = column_key_kernel(columns)
    begin = tl.program_id(1) * SPAN
    for start in tl.range(begin, min(begin + SPAN, N), ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        row = rows.to(tl.int64)[:, None]
        here = (rows < N)[:, None]
        real = here & inside
        at = gate_up + row * (2 * F) + columns[None, :]
        dh_at = dh + row * F + columns[None, :]
        g = tl.load(at, mask=real, other=0.0)
        kind = g.dtype
        g = g.to(tl.float32)
        u = tl.load(at + F, mask=real, other=0.0).to(tl.float32)
        d = tl.load(dh_at, mask=real, other=0.0).to(tl.float32)
        if ADAPTED:
            xa_gate = tl.load(xa + row * (2 * R) + ranks[None, :], mask=here & thin, other=0.0)
            xa_up = tl.load(xa + row * (2 * R) + R + ranks[None, :], mask=here & thin, other=0.0)
            g = tl.dot(xa_gate, tl.trans(b_gate), g, input_precision="ieee")
            u = tl.dot(xa_up, tl.trans(b_up), u, input_precision="ieee")
        if DOWN:
            t_down = tl.load(t + row * R + ranks[None, :], mask=here & thin, other=0.0)
            if DROP:
                keep = kept_kernel(row_key_kernel(seeds, 0, rows), column_key, 0, threshold)
                part = tl.dot(t_down, a, input_precision="ieee")
                d += tl.where(keep, part * keep_scale, 0.0)
            else:
                d = tl.dot(t_down, a, d, input_precision="ieee")
        share = tl.sigmoid(g)
        silu = g * share
        dg = (d * u * share * (1 + g * (1 - share))).to(kind)
        du = (d * silu).to(kind)
        h = (silu * u).to(kind)
        tl.store(at, dg, mask=real)
        tl.store(at + F, du, mask=real)
        if AGAIN:
            tl.store(dh_at, h, mask=real)
        if ADAPTED:
            db_gate = tl.dot(tl.trans(dg), xa_gate, db_gate, input_precision="ieee")
            db_up = tl.dot(tl.trans(du), xa_up, db_up, input_precision="ieee")
        if DOWN:
            if DROP:
                h = tl.where(keep, h, 0.0)
            da = tl.dot(tl.trans(h), t_down, da, input_precision="ieee")
    found += tl.program_id(1).to(tl.int64) * GRADIENTS * R
    store = (columns < F)[:, None] & thin
    if ADAPTED:
        at = found + columns[:, None] * R + ranks[None, :]
        tl.store(at, db_gate, mask=store)
        tl.store(at + F * R, db_up, mask=store)
    if DOWN:
        at = found + (GRADIENTS - F) * R + ranks[None, :] * F + columns[:, None]
        tl.store(at, da * keep_scale, mask=store)
