"""Which inputs an adapter drops: a function of a seed and a place, so that no mask is ever kept.

A number is drawn for each forward pass; whether element (row, column) is dropped follows from it by a hash, in the
forward pass, in the backward pass and in a recomputed one alike, on any device and in blocks of any shape. Adapters
that share an input have masks of their own: the first two come from one hash, folded once and twice, the third from
another seed. What is kept is scaled up where the products end, not one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.kernels.launch import jit, tl

WORD = 2**32 - 1
ROW, COLUMN, FIRST, SECOND = 0x9E3779B1, 0x85EBCA77, 0x7FEB352D, 0x846CA68B  # odd, with bits well mixed


@dataclass(frozen=True)
class Dropout:
    """How a pass drops the input of up to three adapters: seeds (2,) int64 on the device, the share in 1/65536."""

    seeds: Tensor
    threshold: int  # sixteen random bits below it: dropped

    @staticmethod
    def draw(share: float, device: torch.device, seeds: int = 2) -> Dropout:
        """Seeds from PyTorch's generator for `device`."""
        return Dropout(torch.randint(0, 2**31, (seeds,), device=device), round(share * 65536))

    @property
    def scale(self) -> float:
        """What the inputs that are kept are multiplied by."""
        return 65536 / (65536 - self.threshold)


def kept(drop: Dropout, which: int, rows: int, columns: int) -> Tensor:
    """Whether each place of the input (rows, columns) of adapter `which`, among those that share it, is kept."""
    device = drop.seeds.device
    r = mixed((torch.arange(rows, device=device) * ROW & WORD) ^ drop.seeds[which // 2])
    c = mixed(torch.arange(columns, device=device) * COLUMN & WORD)
    bits = (r[:, None] ^ c) * FIRST & WORD
    if which % 2:
        bits = (bits ^ bits >> 15) * SECOND & WORD
    return bits >> 16 >= drop.threshold


def mixed(x: Tensor) -> Tensor:
    """32 bits, held in an int64, well mixed: two rounds of multiply and fold."""
    x = x * FIRST & WORD
    x = (x ^ x >> 15) * SECOND & WORD
    return x ^ x >> 16


@jit
def mixed_kernel(x):
    x = x * 0x7FEB352D  # the numbers above, which a kernel cannot read
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def row_key_kernel(seeds, which, rows):
    """Of rows (n,): what they bring into the hash."""
    seed = tl.load(seeds + which // 2).to(tl.uint32)
    return mixed_kernel((rows.to(tl.uint32) * 0x9E3779B1) ^ seed)


@jit
def column_key_kernel(columns):
    return mixed_kernel(columns.to(tl.uint32) * 0x85EBCA77)


@jit
def kept_kernel(row_key, column_key, which: tl.constexpr, threshold):
    """Whether each place of a tile (rows, columns) is kept."""
    bits = (row_key[:, None] ^ column_key[None, :]) * 0x7FEB352D
    if which % 2 == 1:
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return (bits >> 16).to(tl.int32) >= threshold
