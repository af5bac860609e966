"""AdamW, https://arxiv.org/abs/1711.05101, on bf16 weights whose fp32 masters are split in two (see `masters.py`).

One pass over a parameter: its masters joined, moments updated (fp32, or eight bits in blocks of 256 that share a
scale, https://arxiv.org/abs/2110.02861), the step taken in fp32, everything split and rounded again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.kernels.launch import blocks, fused, jit, tl

BLOCK = 256  # weights that share the scale of their 8-bit moments
CHUNK = 2**22  # weights at a time in the plain twin


@dataclass(frozen=True)
class Moment:
    """A running mean: of gradients, or of their squares."""

    values: Tensor  # fp32, or uint8: which of `levels`
    scales: Tensor | None = None  # (blocks,) fp32: what a level is multiplied by
    levels: Tensor | None = None  # (256,) fp32, ascending
    borders: Tensor | None = None  # (255,) fp32: halfway between neighbouring levels


@dataclass(frozen=True)
class Rate:
    """What a step of this optimizer is for all parameters, but for the numbers on the device."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    device: Tensor  # (4,) fp32: what gradients are multiplied by; 1 to apply the step, 0 to leave everything as it
    # is; and the shares of the means that are not their start, 1 - beta^t


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 masters of bf16 weights and what int16 adds to them."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)


def split(masters: Tensor) -> tuple[Tensor, Tensor]:
    """The opposite of `join`, exactly: the nearest bf16 (away from zero if two are as near), and the rest."""
    bits = masters.view(torch.int32)
    upper = bits + 0x8000 >> 16
    return upper.short().view(torch.bfloat16), (bits - (upper << 16)).short()


def adamw_(weight: Tensor, lower: Tensor, gradient: Tensor, mean: Moment, square: Moment, rate: Rate) -> None:
    """Move a contiguous bf16 parameter, the lower halves of its masters and its moments by one step, in place."""
    if not fused(weight):
        plain_adamw_(weight, lower, gradient, mean, square, rate)
        return
    n, eight = weight.numel(), mean.scales is not None
    adamw_kernel[(blocks(n, 512),)](
        weight, lower, gradient, mean.values, mean.scales, mean.levels, mean.borders, square.values, square.scales,
        square.levels, square.borders, rate.device, rate.lr, rate.weight_decay, *rate.betas, rate.eps, n, eight, BLOCK,
        512, num_warps=2,
    )  # fmt: skip


def plain_adamw_(weight: Tensor, lower: Tensor, gradient: Tensor, mean: Moment, square: Moment, rate: Rate) -> None:
    scale, apply, share1, share2 = rate.device.tolist()
    if not apply:
        return
    flat = [x.view(-1) for x in (weight, lower, gradient, mean.values, square.values)]
    for start in range(0, weight.numel(), CHUNK):
        w, low, g, m, v = (x[start : start + CHUNK] for x in flat)
        at = start // BLOCK
        wide = g.float() * scale
        first = torch.lerp(read(m, mean, at), wide, 1 - rate.betas[0])
        second = torch.lerp(read(v, square, at), wide.square(), 1 - rate.betas[1])
        step = (first / share1) / ((second / share2).sqrt() + rate.eps)
        masters = join(w, low) * (1 - rate.lr * rate.weight_decay) - rate.lr * step
        for place, value in zip((w, low), split(masters), strict=True):
            place.copy_(value)
        write(m, first, mean, at)
        write(v, second, square, at)


def read(values: Tensor, moment: Moment, at: int) -> Tensor:
    if moment.scales is None:
        return values
    scales = moment.scales[at : at + blocks(len(values), BLOCK)].repeat_interleave(BLOCK)[: len(values)]
    return moment.levels[values.int()] * scales


def write(place: Tensor, values: Tensor, moment: Moment, at: int) -> None:
    if moment.scales is None:
        place.copy_(values)
        return
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1)
    moment.scales[at : at + len(scales)] = scales
    nearest = torch.bucketize(padded / scales.clamp(min=1e-38)[:, None], moment.borders)
    place.copy_(nearest.view(-1)[: len(values)])


@jit
def nearest_level_kernel(x, borders, SIGNED: tl.constexpr):
    """Which of 256 levels is nearest to each x in [-1, 1].

    The levels are evenly spread over each of seven decades, 2^i of them in the i-th (twice as many without signs), so
    arithmetic finds the place but for one, and the borders on both sides of it settle that.
    """
    y = tl.abs(x)
    decade = (y >= 1e-6).to(tl.int32) + (y >= 1e-5).to(tl.int32) + (y >= 1e-4).to(tl.int32)
    decade += (y >= 1e-3).to(tl.int32) + (y >= 1e-2).to(tl.int32) + (y >= 1e-1).to(tl.int32)
    count = 1 << (decade if SIGNED else decade + 1)
    share = (y * tl.exp2((6 - decade) * 3.321928094887362) - 0.1) / 0.9  # of its decade
    place = tl.minimum(tl.maximum((share * count).to(tl.int32), 0), count - 1) + count
    level = tl.where(x < 0, 127 - place, 127 + place) if SIGNED else place - 1
    above = x > tl.load(borders + level, mask=level < 255, other=float("inf"))
    below = x <= tl.load(borders + level - 1, mask=level > 0, other=float("-inf"))
    return level + above.to(tl.int32) - below.to(tl.int32)


@jit
def adamw_kernel(
    weight, lower, gradient, mean, mean_scale, mean_levels, mean_borders, square, square_scale, square_levels,
    square_borders, rate, lr, weight_decay, beta1, beta2, eps, n,
    EIGHT: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, SIZE).reshape(SIZE // BLOCK, BLOCK)
    real = start + at < n
    group = start // BLOCK + tl.arange(0, SIZE // BLOCK)
    groups = group * BLOCK < n
    if tl.load(rate + 1) != 0.0:
        g = tl.load(gradient + start + at, mask=real, other=0.0).to(tl.float32) * tl.load(rate)
        m = tl.load(mean + start + at, mask=real, other=0)
        v = tl.load(square + start + at, mask=real, other=0)
        if EIGHT:
            m = tl.load(mean_levels + m.to(tl.int32)) * tl.load(mean_scale + group, mask=groups, other=0.0)[:, None]
            v = tl.load(square_levels + v.to(tl.int32)) * tl.load(square_scale + group, mask=groups, other=0.0)[:, None]
        m += (g - m) * (1 - beta1)
        v += (g * g - v) * (1 - beta2)
        high = tl.load(weight + start + at, mask=real, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(lower + start + at, mask=real, other=0).to(tl.int32)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)
        step = (m / tl.load(rate + 2)) / (tl.sqrt(v / tl.load(rate + 3)) + eps)
        w = w * (1 - lr * weight_decay) - lr * step
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weight + start + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=real)
        tl.store(lower + start + at, (bits - (high << 16)).to(tl.int16), mask=real)
        if EIGHT:
            m = tl.where(real, m, 0.0)
            v = tl.where(real, v, 0.0)
            scale = tl.max(tl.abs(m), 1)
            tl.store(mean_scale + group, scale, mask=groups)
            m = nearest_level_kernel(m / tl.maximum(scale, 1e-38)[:, None], mean_borders, True)
            scale = tl.max(tl.abs(v), 1)
            tl.store(square_scale + group, scale, mask=groups)
            v = nearest_level_kernel(v / tl.maximum(scale, 1e-38)[:, None], square_borders, False)
        tl.store(mean + start + at, m, mask=real)
        tl.store(square + start + at, v, mask=real)
