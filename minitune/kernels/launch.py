"""Where Triton is, and when an operation uses it."""

try:
    import triton
    import triton.language as tl
except ImportError:  # no Linux, or PyTorch without CUDA
    triton = tl = None

from collections.abc import Callable

import torch
from torch import Tensor


def jit(function):
    """triton.jit, where there is Triton."""
    return function if triton is None else triton.jit(function)


def fused(x: Tensor) -> bool:
    """Whether the Triton twin of an operation takes x."""
    return triton is not None and x.is_cuda


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is not below n, nor below `least`: what a block may measure."""
    return max(least, 1 << (n - 1).bit_length())


def blocks(n: int, size: int) -> int:
    return -(-n // size)


def fault(device: torch.device, largest: Callable[[], object] = lambda: None) -> str | None:
    """Why Triton's kernels cannot run on a CUDA device, or None: tried with the smallest of them, then by `largest`,
    which launches the one that needs most of a card and waits for it."""
    if triton is None:
        return "Triton is not installed"
    try:
        out = torch.empty(1, dtype=torch.int32, device=device)
        one_kernel[(1,)](out)
        if out.item() != 1:
            return "Triton's kernels compute wrongly here"
        largest()
        return None
    except Exception as error:  # whatever a compiler, a driver or a missing file may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"Triton fails here: {reason[:200]}"


@jit
def one_kernel(out):
    tl.store(out, 1)
