"""How long the GPU takes for something, and what it can do at most."""

import statistics
from collections.abc import Callable

import torch

BUSY = 2_000_000  # GPU cycles of waiting before the clock starts, so that launches are ahead of the work


def gpu_seconds(work: Callable[[], object], times: int = 7, together: int = 4) -> float:
    """The median of several timings, each of a few repetitions in a row, after two that do not count."""
    for _ in range(2):
        work()
    found = []
    for _ in range(times):
        torch.cuda._sleep(BUSY)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(together):
            work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / together)
    return statistics.median(found)


def copy_bandwidth() -> float:
    """Bytes a second that a device copy reads and writes."""
    source = torch.empty(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source))


def product_rate() -> float:
    """Operations a second of the largest product of an 8B block, 8192 x 4096 x 14336 in bf16, on random numbers."""
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((8192, 4096), (14336, 4096)))
    return 2 * 8192 * 4096 * 14336 / gpu_seconds(lambda: a @ b.T, times=15)
