"""The sha256 of large files, remembered: a base of 140 GB takes minutes to read, and its bytes are what it is.

What is remembered lies in the user's own cache folder, and counts only for a file of the same place, size, inode and
times. The time of an inode's last change (ctime) is the system's to set: whoever rewrites a file and puts its other
times back still moves it. A folder that others can write to, or that another user owns, is not used.
"""

import json
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from minitune import files
from minitune.errors import UserError
from minitune.foreign import read_json

SMALL = 20_000_000  # bytes; up to here a file is read anew each time
SETTLED = 5  # seconds after its last change from which a file's times tell it from a later version


def of_file(path: Path) -> str:
    """Hex sha256 of all bytes of a file, read or remembered."""
    before = os.stat(path)
    if before.st_size <= SMALL:
        return files.sha256(path)
    key = f"{os.path.realpath(path)}\0{identity(before)}"
    known = remembered()
    if key in known:
        return known[key]
    digest = files.sha256(path)
    after = os.stat(path)
    if identity(after) != identity(before):
        raise UserError(f"{path} was changed while it was read; run again when it is whole")
    if time.time() - max(after.st_mtime, after.st_ctime) > SETTLED:
        remember(key, digest)
    return digest


def identity(found: os.stat_result) -> str:
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def store() -> Path | None:
    """The file of what is remembered, in a folder of this user's alone; None where there can be none."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "minitune"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = os.lstat(folder)
    except (OSError, RuntimeError):
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder / "digests.json" if private else None


def remembered() -> dict[str, str]:
    path = store()
    try:
        known = read_json(path) if path else {}
    except UserError:  # there is none yet, or a damaged one, which the next digest replaces
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str) and len(value) == 64}


def remember(key: str, digest: str) -> None:
    """Best effort: two runs at once may forget one another's, and a full disk must not end a run."""
    path = store()
    if path is None:
        return
    place = key.split("\0")[0]
    known = {other: value for other, value in remembered().items() if other.split("\0")[0] != place}
    with suppress(OSError):
        files.write_text(path, json.dumps(known | {key: digest}))
