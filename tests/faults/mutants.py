"""Guards taken out of minitune, one at a time and from outside: what each row's control is run with."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minitune import checkpoint, files, lock, optim, runs, saver, signals, train


def forget_moments() -> None:
    """A resume that leaves the optimizer's memory out."""
    optim.load_state = lambda *arguments: None


def write_in_place() -> None:
    """Folders and files that are written where they will stand, not beside."""

    @contextmanager
    def new_folder(path: Path) -> Iterator[Path]:
        path.mkdir(parents=True, exist_ok=True)
        yield path

    @contextmanager
    def replacing(path: Path) -> Iterator[object]:
        with open(path, "wb", buffering=0) as file:
            yield file

    files.new_folder, files.replacing = new_folder, replacing


def no_sweep() -> None:
    """What a killed writer left half-made is left where it is."""
    files.sweep = lambda folder, *names: None


def trust_all() -> None:
    """Checkpoints that are taken as they lie there."""
    checkpoint.damaged = lambda path: None


def take_any_best() -> None:
    """The best checkpoint is handed over whosever it is."""
    train.unfit = lambda *arguments: None


def no_fsync() -> None:
    """Nothing is flushed to the disk."""
    os.fsync = os.fdatasync = lambda handle: None


def deaf() -> None:
    """Signals go unheard."""

    @contextmanager
    def stop_signals() -> Iterator[signals.Stop]:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        yield signals.Stop()

    train.stop_signals = stop_signals


def no_lock() -> None:
    """Folders are open to all."""

    @contextmanager
    def hold(run: Path) -> Iterator[None]:
        yield

    lock.hold = hold


def swap_locks() -> None:
    """Locks that are held are taken for free, and free ones for held."""
    real = fcntl.lockf

    def lockf(*arguments: object) -> None:
        try:
            real(*arguments)
        except BlockingIOError:
            return
        raise BlockingIOError

    fcntl.lockf = lockf


def never_finished() -> None:
    """A finished run goes through its end again."""
    runs.finished = lambda run: None


def anyones() -> None:
    """A folder is taken for this run's, whatever run.json says."""
    runs.refuse_another = lambda run, identity: None


def nothing_kept() -> None:
    """What was edited is written over."""
    runs.keep_changed = lambda run: None


def blind() -> None:
    """No number is looked at before it is used."""
    torch.isfinite = lambda tensor: torch.ones_like(tensor, dtype=torch.bool)
    checkpoint.check_numbers = lambda tensors: None


def swallow_errors() -> None:
    """A save that fails is forgotten."""
    saver.Saver.check = lambda self: None


def delete_by_number() -> None:
    """Rotation that counts folders, whatever is in them."""
    saver.needed = lambda valid, keep_last, best_step: set(sorted(valid)[-keep_last:])
