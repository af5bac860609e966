"""Guards taken out of minitune, one at a time and from outside: what each row's control is run with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitune import checkpoint, files, optim


def forget_moments() -> None:
    """A resume that leaves the optimizer's memory out."""
    optim.load_state = lambda *arguments: None


def write_in_place() -> None:
    """Folders and files that are written where they will stand, not beside."""

    @contextmanager
    def new_folder(path: Path) -> Iterator[Path]:
        path.mkdir(parents=True, exist_ok=True)
        yield path

    files.new_folder = new_folder
    files.write_bytes = lambda path, data: write_slowly(path, data)


def write_slowly(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def trust_all() -> None:
    """Checkpoints that are taken as they lie there."""
    checkpoint.damaged = lambda path: None


def no_fsync() -> None:
    """Nothing is flushed to the disk."""
    os.fsync = os.fdatasync = lambda handle: None
