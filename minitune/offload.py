"""What blocks keep for the backward pass, in host memory while it waits.

A copy out starts when a block's forward pass ends and goes on beside the compute of the next blocks; a copy back
starts one block ahead of its use. So a GPU holds the kept tensors of two or three blocks, and the others lie in
page-locked memory, which the copies can reach without the processor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 2**20  # bytes; below it a copy is not worth its start
WIDEST = 2  # bytes a number: fp32 ones are tables that all blocks share, and small
IN_FLIGHT = 2  # blocks whose copies out may still be under way


@dataclass
class Away:
    """One tensor in host memory, or on its way."""

    stretch: Tensor  # of host memory, page-locked on a machine with a GPU
    host: Tensor  # the same, as what lies in it
    here: Tensor | None  # on the device: until it has left, and once it is back
    moved: torch.cuda.Event | None = None  # after the copy last started


class HostMemory:
    """Where blocks put what they keep. One for all blocks of a model, used in the order of its layers."""

    def __init__(self, device: torch.device) -> None:
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: list[list[Away]] = []  # of each block whose backward pass is to come, in the order of forward
        self.free: dict[int, list[Tensor]] = defaultdict(list)  # stretches of host memory to use again, by bytes

    @contextmanager
    def block(self) -> Iterator[None]:
        """Within it, the large tensors that autograd saves go to host memory; it is one block's forward pass."""
        if not torch.is_grad_enabled():
            yield
            return
        mine: list[Away] = []
        self.waiting.append(mine)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: self.put(x, mine), lambda x: self.get(x, mine)):
            yield
        if not mine:  # no backward pass comes for it, or nothing of it is worth a copy
            self.waiting.pop()
        for away in self.waiting[-1 - IN_FLIGHT] if len(self.waiting) > IN_FLIGHT else ():
            self.wait(away)
            away.here = None  # compute has waited for the copy, so the memory may be used again

    def put(self, x: Tensor, mine: list[Away]) -> Tensor | Away:
        if x.nbytes < SMALLEST or x.itemsize > WIDEST:
            return x
        room = host_bytes(x.nbytes)
        stretch = self.free[room].pop() if self.free[room] else self.page_locked(room)
        host = stretch[: x.nbytes].view(x.dtype).view(x.shape)
        away = Away(stretch, host, x.detach())
        self.copy(away, out=True)
        mine.append(away)
        return away

    def page_locked(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.copies is not None)
        except RuntimeError as error:
            if "out of memory" not in str(error):  # the device tells of other things here, too
                raise
            raise MemoryError("no page-locked host memory") from error

    def get(self, x: Tensor | Away, mine: list[Away]) -> Tensor:
        if isinstance(x, Tensor):
            return x
        if self.waiting and self.waiting[-1] is mine:  # the first of this block: time to fetch the next one's
            self.waiting.pop()
            for away in (*mine, *(self.waiting[-1] if self.waiting else ())):
                if away.here is None:
                    away.here = torch.empty_like(away.host, device=self.device, pin_memory=False)
                    self.copy(away, out=False)
        self.wait(x)
        self.free[x.stretch.nbytes].append(x.stretch)  # copies follow each other, so it may be filled anew
        here, x.here = x.here, None
        return here

    def copy(self, away: Away, out: bool) -> None:
        source, target = (away.here, away.host) if out else (away.host, away.here)
        self.device = away.here.device
        if self.copies is None:
            target.copy_(source)
            return
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
            away.moved = self.copies.record_event()

    def wait(self, away: Away) -> None:
        """Let compute wait for the copy last started."""
        if away.moved is not None:
            torch.cuda.current_stream().wait_event(away.moved)


def host_bytes(size: int) -> int:
    """What so many bytes take of host memory: the next power of two, as page-locked memory is given out anyway; so
    batches of many widths share few sizes. 0 for what stays on the device."""
    return 1 << (size - 1).bit_length() if size >= SMALLEST else 0


def block_of(host: HostMemory | None):
    """The context of one block's forward pass: `host.block()`, or nothing."""
    return nullcontext() if host is None else host.block()
