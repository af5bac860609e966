"""One run to a folder.

`run.lock` says who is there, and the kernel's lock on it decides: it ends with its process, however that ends, and
NFS carries it from host to host. So no dead run keeps a folder, and what is written in the file is for people. Only
where a file system has no locks does the file decide, by process, start time and boot.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitune.errors import RunFailed, UserError
from minitune.log import say

NAME = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
held: dict[tuple[int, int], int] = {}  # folders (device, inode) that this process holds: its locks are blind to itself


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep other runs out of the folder `run` within the block.

    Raises:
        UserError: another run is in it, or run.lock is something else than a plain file.
        RunFailed: a file could not be had within the block, since the folder has been moved meanwhile.
    """
    folder = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # it may be renamed meanwhile
    key = (os.fstat(folder).st_dev, os.fstat(folder).st_ino)
    try:
        if key in held:
            raise UserError(f"{run} is in use by this very process; choose another `out`, or wait for that run's end")
        handle = take(run, folder)
        held[key] = folder
        try:
            yield
        except OSError:
            must_be_there(run)
            raise
        finally:
            del held[key]
            with contextlib.suppress(OSError):
                os.unlink(NAME, dir_fd=folder)  # while it is held: whoever has just opened it will see it is gone
            os.close(handle)
    finally:
        os.close(folder)


def must_be_there(run: Path) -> None:
    """Raise RunFailed if the folder that this process holds is not at `run` any more: what is written by that name
    would be half of a run, in a folder made anew."""
    now = os.stat(run) if os.path.exists(run) else None
    if held and not any(now and os.path.samestat(now, os.fstat(folder)) for folder in held.values()):
        raise RunFailed(
            f"{run} was moved or deleted while its run was under way, and no half of a run is written in its place; "
            "move it back, and run again to go on from its newest checkpoint"
        )


def take(run: Path, folder: int) -> int:
    """The file descriptor that holds the lock."""
    while True:
        handle, taken = open_lock(run, folder), False
        try:
            by_kernel = lock(handle)
            if by_kernel is None:
                raise UserError(f"{run} is in use by {who(read(handle))}; choose another `out`, or wait for its end")
            if not is_there(handle, folder):  # whoever held it has just deleted it
                continue
            if left := read(handle):
                if not by_kernel and (why := may_live(left)):
                    raise UserError(f"{run} may be in use by {who(left)} ({why}); if it is not, delete {run / NAME}")
                say(f"{NAME} was left behind by {who(left)}, which has ended; taking over")
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(myself()).encode(), 0)
            os.fsync(handle)
            taken = True
            return handle
        finally:
            if not taken:
                os.close(handle)


def open_lock(run: Path, folder: int) -> int:
    """Open run.lock, made if it is not there; never what a link of that name points to."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(NAME, flags, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM):
            raise
        raise UserError(f"{run / NAME} is in the way ({error.strerror}); move it elsewhere") from None
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        os.close(handle)
        raise UserError(f"{run / NAME} is in the way: it is no plain file, or has a second name; move it elsewhere")
    return handle


def lock(handle: int) -> bool | None:
    """True: it is ours. None: it is another process'. False: the file system has no locks.

    Of the two kinds, fcntl's: children do not inherit it, so it does not outlive the run in one of its workers.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def is_there(handle: int, folder: int) -> bool:
    """Whether run.lock is still the file that was opened."""
    try:
        now = os.stat(NAME, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(now, os.fstat(handle))


# ---- what is written in it -----------------------------------------------------------------------------------------


def myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot(), "started": started(os.getpid())}


def read(handle: int) -> dict[str, Any]:
    """What the lock says; empty if nothing, or nothing that a run would say."""
    try:
        said = json.loads(os.pread(handle, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def who(said: dict[str, Any]) -> str:
    pid, host = said.get("pid"), said.get("host")
    if type(pid) is not int or not isinstance(host, str):
        return "another run"
    return f"process {str(pid)[:20]} on {host[:100]!r}"


def may_live(said: dict[str, Any]) -> str | None:
    """Why the process that a lock names may still be running, as far as can be seen from here; None if it is not."""
    if said.get("host") != socket.gethostname():
        return "another machine"
    pid = said.get("pid")
    if said.get("boot") != boot() or type(pid) is not int or not 0 < pid < 2**31:
        return None
    return "it is running" if started(pid) is not None and started(pid) == said.get("started") else None


def boot() -> str | None:
    """What tells one start of this machine from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def started(pid: int) -> int | None:
    """When a process began, in ticks since the machine's start: numbers of processes are used again."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
