"""Guards taken out of minitune, one at a time and from outside: what each row's control is run with."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitune import checkpoint, files, optim, train


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
    files.write_bytes = write_over


def write_over(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def trust_all() -> None:
    """Checkpoints that are taken as they lie there."""
    checkpoint.damaged = lambda path: None


def no_fsync() -> None:
    """Nothing is flushed to the disk."""
    os.fsync = os.fdatasync = lambda handle: None


def deaf() -> None:
    """Signals go unheard."""

    @contextmanager
    def stop_signals() -> Iterator[train.Stop]:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        yield train.Stop()

    train.stop_signals = stop_signals
