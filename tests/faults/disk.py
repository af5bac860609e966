"""Disks that fill: what was saved stays whole, the run ends with exit 1, and goes on when there is room."""

import ctypes
import errno
import os
import resource
import subprocess
from functools import cache, partial
from pathlib import Path

import mutants
from forked import Ended, Plant
from kills import litter, method_of, must_have_kept, noter
from outcome import must_equal, valid
from points import Point, is_save, watch
from rows import Case, Row, must, must_end_well, must_refuse

CLONE_NEWNS = 0x00020000  # <linux/sched.h>


def no_large_files(case: Case, share: float = 0.0, mutant: tuple[Plant, ...] = ()) -> None:
    """From its second save on the run may write no file of more than so many bytes (RLIMIT_FSIZE): from one byte to
    just less than its largest file needs."""
    method = method_of(case.index)
    sizes = [path.stat().st_size for path in case.world.stopped[method].rglob("*") if path.is_file()]
    most = int(max(sizes) * share or max(sizes) ** ((case.index + 1) / (case.count + 1)))
    note, saves, pipe = noter(case), [], os.pipe()

    def after(point: Point) -> None:
        if is_save(point):
            note()
            saves.append(point)
            if len(saves) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def speak_through_a_pipe() -> None:
        """What the run says goes to no file, so that only the run's own are limited."""
        for number in (1, 2):
            os.dup2(pipe[1], number)

    ended = case.world.run(case.run, method, speak_through_a_pipe, *mutant, watch(case.run, after=after))
    os.close(pipe[1])
    with os.fdopen(pipe[0], errors="replace") as said:
        must_have_stopped(case, Ended(ended.code, "", said.read(), ended.seconds))
    must_go_on(case, method)


def no_room(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """The run's folder is a disk of its own, too small by more or less; where none may be mounted, ENOSPC is raised
    by what writes."""
    method = method_of(case.index)
    needed = used(case.world.stopped[method])
    room = int(needed * (0.25 + 0.7 * case.index / case.count))
    case.run.mkdir()
    note = noter(case)

    def after(point: Point) -> None:
        if is_save(point):
            note()

    def full(point: Point) -> None:
        if point.name in ("open", "write", "torn write", "mkdir") and used(case.run) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point.path)

    if may_mount():
        mount("-t", "tmpfs", "-o", f"size={room}", "none", str(case.run))
        try:
            must_have_stopped(case, case.world.run(case.run, method, *mutant, watch(case.run, after=after)))
            mount("-o", "remount,size=64m", str(case.run))
            must_go_on(case, method)
        finally:
            subprocess.run(["umount", "-l", str(case.run)], check=False)
    else:
        must_have_stopped(case, case.world.run(case.run, method, *mutant, watch(case.run, full, after)))
        must_go_on(case, method)


def must_have_stopped(case: Case, ended: Ended) -> None:
    must("Traceback" not in ended.err + ended.out, ended.said())
    saved = (case.folder / "saved").stat().st_size
    must_refuse(ended, (1,) if saved else (1, 2))
    must_have_kept(case)
    must(not saved or valid(case.run), "no checkpoint is left")


def must_go_on(case: Case, method: str) -> None:
    must_end_well(case.world.run(case.run, method))
    must_equal(case.run, case.world.straight[method])
    must(not (left := litter(case.run)), f"left behind: {', '.join(left)}")


def used(folder: Path) -> int:
    """Bytes on the disk, in whole pages as a file system counts them."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            total += -(-os.lstat(os.path.join(path, name)).st_size // 4096) * 4096
    return total


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@cache
def may_mount() -> bool:
    """Whether this process may mount: then it does so in a namespace of its own, which ends with it."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True).returncode == 0


ROWS = [
    Row(
        "no file above a size",
        no_large_files,
        partial(no_large_files, share=0.9, mutant=(mutants.swallow_errors,)),
        full=10,
        pr=3,
    ),
    Row("no room on the disk", no_room, partial(no_room, mutant=(mutants.swallow_errors,)), full=10, pr=3),
]
