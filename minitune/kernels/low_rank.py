"""The thin products of adapters: N tokens by some thousand features by a rank of 8 to 64.

They move a lot and compute little, so what counts is how often a large tensor is read. Adapters whose linears read
the same input are stacked: their `down` reads it once. Without dropout these are plain products, and cuBLAS is the
fastest at them; with it, what is dropped is decided where an input is read (`dropout.py`), so that no masked copy of
it is ever made. Everything is summed in one order, so the same bits come out each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.kernels.dropout import Dropout, column_key_kernel, kept, kept_kernel, row_key_kernel
from minitune.kernels.launch import blocks, fused, jit, power_of_two, tl


def down(x: Tensor, A: Tensor, scale: float, adapters: int = 1, drop: Dropout | None = None) -> Tensor:
    """scale * dropped(x) A^T: x (N, C), the A (n r, C) of n adapters stacked -> (N, n r), each its own r columns."""
    out = x.new_empty(x.shape[0], A.shape[0])
    if drop is None:
        return torch.addmm(out, x, A.T, beta=0, alpha=scale, out=out)
    if not fused(x):
        return plain_down(x, A, scale, adapters, drop)
    (N, C), r = x.shape, A.shape[0] // adapters
    rows = 64 if N > 8192 else 32 if N > 2048 else 16
    down_kernel[(blocks(N, rows),)](
        x, A, drop.seeds, out, N, C, x.stride(0), scale * drop.scale, drop.threshold,
        adapters, r, power_of_two(r, 16), rows, 128, num_warps=4, num_stages=stages(r),
    )  # fmt: skip
    return out


def up(t: Tensor, A: Tensor, adapters: int = 1, drop: Dropout | None = None) -> Tensor:
    """The gradient of `down` for its input: sum over adapters of dropped(t_i A_i), t (N, n r), A (n r, C) -> (N, C)."""
    if drop is None:
        return t @ A
    if not fused(t):
        return plain_up(t, A, adapters, drop)
    (N, C), r = (t.shape[0], A.shape[1]), A.shape[0] // adapters
    out = t.new_empty(N, C)
    up_kernel[(blocks(N, 64), blocks(C, 128))](
        t, A, drop.seeds, out, N, C, drop.threshold, drop.scale, adapters, r, power_of_two(r, 16), 64, 128
    )
    return out


def gradient(t: Tensor, x: Tensor, adapters: int = 1, drop: Dropout | None = None) -> Tensor:
    """The gradient of `down` for A: t^T dropped(x), t (N, n r), x (N, C) -> (n r, C) fp32."""
    if drop is None:
        return product_fp32(t.T, x)
    if not fused(x):
        return plain_gradient(t, x, adapters, drop)
    (N, C), r = x.shape, t.shape[1] // adapters
    splits = max(1, min(blocks(N, 256), 528 // blocks(C, 128)))  # four programs for each of some 132 processors
    out = torch.empty(splits, t.shape[1], C, dtype=torch.float32, device=x.device)
    gradient_kernel[(blocks(C, 128), splits)](
        t, x, drop.seeds, out, N, C, x.stride(0), blocks(blocks(N, 64), splits) * 64, drop.threshold, drop.scale,
        adapters, r, power_of_two(r, 16), 64, 128, num_warps=4, num_stages=stages(r),
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


def stages(r: int) -> int:
    """How many tiles are on their way at once: as many as a processor's shared memory has room for."""
    return 4 if r <= 32 else 3


def plain_down(x: Tensor, A: Tensor, scale: float, adapters: int, drop: Dropout) -> Tensor:
    parts = [dropped(x, drop, i) @ a.T for i, a in enumerate(A.chunk(adapters))]
    return scale * drop.scale * torch.cat(parts, dim=1)


def plain_up(t: Tensor, A: Tensor, adapters: int, drop: Dropout) -> Tensor:
    parts = zip(t.chunk(adapters, dim=1), A.chunk(adapters), strict=True)
    return drop.scale * sum(dropped(ti @ a, drop, i) for i, (ti, a) in enumerate(parts))


def plain_gradient(t: Tensor, x: Tensor, adapters: int, drop: Dropout) -> Tensor:
    parts = [product_fp32(ti.T, dropped(x, drop, i)) for i, ti in enumerate(t.chunk(adapters, dim=1))]
    return drop.scale * torch.cat(parts)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (or fp64), never rounded to less."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def dropped(x: Tensor, drop: Dropout | None, which: int) -> Tensor:
    """x (N, C) as adapter `which` sees it, not scaled up; linear in x, so its gradient is the same function."""
    return x if drop is None else x * kept(drop, which, *x.shape)


@jit
def down_kernel(
    x, A, seeds, out, N, C, x_row, scale, threshold,
    n: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    here = (rows < N)[:, None]
    first = tl.zeros((ROWS, RANKS), tl.float32)
    second, third = first, first
    key_a = row_key_kernel(seeds, 0, rows)
    key_b = row_key_kernel(seeds, 2, rows)
    for start in range(0, C, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        v = tl.load(x_rows + columns[None, :], mask=here & (columns < C)[None, :], other=0.0)
        a_at = A + ranks[None, :] * C + columns[:, None]
        a_real = (ranks < R)[None, :] & (columns < C)[:, None]
        key = column_key_kernel(columns)
        a = tl.load(a_at, mask=a_real, other=0.0)
        w = tl.where(kept_kernel(key_a, key, 0, threshold), v, 0.0)
        first = tl.dot(w, a, first, input_precision="ieee")
        if n > 1:
            a = tl.load(a_at + R * C, mask=a_real, other=0.0)
            w = tl.where(kept_kernel(key_a, key, 1, threshold), v, 0.0)
            second = tl.dot(w, a, second, input_precision="ieee")
        if n > 2:
            a = tl.load(a_at + 2 * R * C, mask=a_real, other=0.0)
            w = tl.where(kept_kernel(key_b, key, 2, threshold), v, 0.0)
            third = tl.dot(w, a, third, input_precision="ieee")
    at = out + rows.to(tl.int64)[:, None] * (n * R) + ranks[None, :]
    store = here & (ranks < R)[None, :]
    tl.store(at, first * scale, mask=store)
    if n > 1:
        tl.store(at + R, second * scale, mask=store)
    if n > 2:
        tl.store(at + 2 * R, third * scale, mask=store)


@jit
def up_kernel(
    t, A, seeds, out, N, C, threshold, keep_scale,
    n: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    key = column_key_kernel(columns)
    t_at = t + rows.to(tl.int64)[:, None] * (n * R) + ranks[None, :]
    t_real = (rows < N)[:, None] & (ranks < R)[None, :]
    a_at = A + ranks[:, None] * C + columns[None, :]
    a_real = (ranks < R)[:, None] & (columns < C)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(n):
        ti = tl.load(t_at + i * R, mask=t_real, other=0.0)
        a = tl.load(a_at + i * R * C, mask=a_real, other=0.0)
        part = tl.dot(ti, a, input_precision="ieee")
        total += tl.where(kept_kernel(row_key_kernel(seeds, i, rows), key, i, threshold), part, 0.0)
    at = out + rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(at, total * keep_scale, mask=(rows < N)[:, None] & (columns < C)[None, :])


@jit
def gradient_kernel(
    t, x, seeds, out, N, C, x_row, SPAN, threshold, keep_scale,
    n: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    inside = (columns < C)[None, :]
    first = tl.zeros((RANKS, COLUMNS), tl.float32)
    second, third = first, first
    key = column_key_kernel(columns)
    begin = tl.program_id(1) * SPAN
    for start in range(begin, min(begin + SPAN, N), ROWS):
        rows = start + tl.arange(0, ROWS)
        x_at = x + rows.to(tl.int64)[:, None] * x_row + columns[None, :]
        v = tl.load(x_at, mask=(rows < N)[:, None] & inside, other=0.0)
        t_at = t + rows.to(tl.int64)[None, :] * (n * R) + ranks[:, None]
        t_real = (rows < N)[None, :] & (ranks < R)[:, None]
        key_a = row_key_kernel(seeds, 0, rows)
        w = tl.where(kept_kernel(key_a, key, 0, threshold), v, 0.0)
        first = tl.dot(tl.load(t_at, mask=t_real, other=0.0), w, first, input_precision="ieee")
        if n > 1:
            w = tl.where(kept_kernel(key_a, key, 1, threshold), v, 0.0)
            second = tl.dot(tl.load(t_at + R, mask=t_real, other=0.0), w, second, input_precision="ieee")
        if n > 2:
            w = tl.where(kept_kernel(row_key_kernel(seeds, 2, rows), key, 2, threshold), v, 0.0)
            third = tl.dot(tl.load(t_at + 2 * R, mask=t_real, other=0.0), w, third, input_precision="ieee")
    at = out + tl.program_id(1).to(tl.int64) * (n * R) * C + ranks[:, None] * C + columns[None, :]
    store = (ranks < R)[:, None] & inside
    tl.store(at, first * keep_scale, mask=store)
    if n > 1:
        tl.store(at + R * C, second * keep_scale, mask=store)
    if n > 2:
        tl.store(at + 2 * R * C, third * keep_scale, mask=store)
