"""What the host has left."""

import os
from contextlib import suppress
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory left for this process: what Linux calls available, on the machine or in the control groups
    (version 2) that the process is in, as far as they have limits; elsewhere than on Linux half of all there is."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        least = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    groups = root / "sys/fs/cgroup"
    with suppress(OSError):
        group = groups / (root / "proc/self/cgroup").read_text().partition("0::/")[2].split("\n")[0]
        for folder in (group, *group.parents):
            if folder.is_relative_to(groups):
                least = min(least, left_in(folder))
    return max(0, int(least))


def left_in(group: Path) -> float:
    """Bytes that a control group has left, files aside that it has read, which make room when asked to."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["file"]) - int(stat["shmem"])
    except (OSError, ValueError, KeyError):  # no limit ("max"), or no such group
        return float("inf")
