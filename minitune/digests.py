"""sha256 of large files, remembered: the weights of an 8B model take a minute to read, and rarely change.

A digest is looked up by the file's path, device, inode, size and the times of its last change. Of these the system
sets ctime itself at every write, and no program can put it back; so a file that looks the same has the same bytes,
short of writing to the raw disk or setting the machine's clock back. A file that changed within the last seconds is
not remembered, since clocks have ticks. The cache is the user's own, and what others could have written there is not
believed.
"""

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path

from minitune import files

SMALL = 50_000_000  # bytes; such files are always read
TICK = 3.0  # seconds; network file systems count in whole ones


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read or remembered."""
    before = looks(path)
    if os.stat(path).st_size <= SMALL:
        return files.sha256(path)
    remembered = folder() / hashlib.sha256(before.encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        digest = files.read_plain(remembered, 64).decode("ascii")
        if len(digest) == 64 and own(remembered.parent):
            return digest
    digest = files.sha256(path)
    changed = max(os.stat(path).st_ctime, os.stat(path).st_mtime)
    if looks(path) == before and time.time() - changed > TICK:
        with contextlib.suppress(OSError):  # a full or read-only home costs time and nothing else
            files.make_parents(remembered.parent)
            os.chmod(remembered.parent, 0o700)
            files.write_text(remembered, digest)
    return digest


def looks(path: Path) -> str:
    """What differs whenever the bytes of a file may."""
    of = os.stat(path)
    return repr((os.path.realpath(path), of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns))


def own(path: Path) -> bool:
    """Whether a folder is one that nobody but this user (and root) can write to."""
    of = os.lstat(path)
    return of.st_uid == os.getuid() and not of.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def folder() -> Path:
    """Where digests are remembered, a file each."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "minitune" / "sha256"
