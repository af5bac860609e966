"""Checkpoints written beside training: a step waits for a copy in host memory, and no longer.

A thread writes the copy, reads it back, and then deletes what is not needed any more (`needed`). One save waits for
the one before it. What goes wrong in the thread ends the run: at the next step, or where the last save is waited for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitune import checkpoint, files, lock, parallel
from minitune.errors import RunFailed
from minitune.log import say
from minitune.progress import Progress


class Saver:
    """The checkpoints of one run. A context manager, which is not left before all of them are on the disk."""

    def __init__(self, run: Path, keep_last: int, run_is: dict[str, Any], saved: int) -> None:
        """`run_is` is the run's identity; step `saved` has its checkpoint already (0: the start, which needs none)."""
        self.run, self.keep_last, self.run_is, self.saved = run, keep_last, run_is, saved
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.shelf = Shelf(run)
        if parallel.is_first():
            files.make_parents(run / "checkpoints")  # here alone: a save after `run` was moved must find none

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Begin to write a checkpoint, unless this step has one."""
        if progress.step == self.saved:
            return
        self.wait()
        snapshot = checkpoint.snapshot(model, optimizer, progress, self.run_is)  # each process gives its part
        self.saved = progress.step
        if not parallel.is_first():
            return
        self.thread = threading.Thread(target=self.write, args=(snapshot,), name="minitune-saver", daemon=True)
        self.thread.start()

    def write(self, snapshot: checkpoint.Snapshot) -> None:
        """In the thread."""
        try:
            lock.must_be_there(self.run)
            if (log := self.run / "metrics.jsonl").exists():
                files.sync(log)  # so that a checkpoint never outlives the lines before it
            self.shelf.add(checkpoint.write(self.run, snapshot))
            self.shelf.clear(self.keep_last, snapshot.state["progress"]["best_step"])
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Raise what has gone wrong in the thread by now."""
        if self.error is None:
            return
        error, self.error = self.error, None
        whole = f"the checkpoints before it are whole, in {self.run / 'checkpoints'}"
        if isinstance(error, OSError):
            lock.must_be_there(self.run)
            reason = error.strerror or str(error)
            raise RunFailed(
                f"checkpoint {self.saved} could not be written ({reason}); {whole}. Make room, or mend the disk, "
                "then run again to go on"
            ) from None
        if isinstance(error, checkpoint.Damaged):
            raise RunFailed(
                f"checkpoint {self.saved} was not kept, since {error}: the last updates were too large; {whole}. "
                "Start anew with a lower optim.learning_rate"
            ) from None
        raise error

    def wait(self) -> None:
        """Until the save under way is on the disk. Raises what has gone wrong in it, on all processes."""
        parallel.on_first(self.join)

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()
        self.check()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.wait()
            return
        try:
            self.join()
        except Exception as error:  # the run ends by what came first
            say(f"{error}")


class Shelf:
    """Which checkpoints of a run are valid, and the best step that each knows of; each looked at once."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.known: dict[Path, tuple[object, int | None]] = {}  # what it looked like when it was valid, its best step

    def add(self, path: Path) -> None:
        """Take in a checkpoint that has just been written and verified."""
        self.known[path] = (looks(path), best_of(path))

    def valid(self) -> dict[int, int | None]:
        """Step -> the best step it knows of, for the checkpoints that are valid."""
        found = {}
        for path in checkpoint.checkpoints(self.run):
            if path not in self.known or self.known[path][0] != looks(path):
                self.known.pop(path, None)
                if checkpoint.damaged(path) is None:
                    self.add(path)
            if path in self.known:
                found[checkpoint.step_of(path)] = self.known[path][1]
        return found

    def clear(self, keep_last: int, best_step: int | None) -> None:
        """Delete the checkpoints that nothing needs any more. One that cannot be deleted stays, and a line says so."""
        keep = needed(self.valid(), keep_last, best_step)
        for path in checkpoint.checkpoints(self.run):
            if checkpoint.step_of(path) in keep:
                continue
            gone = path.with_name(f".{path.name}.part")  # by one rename: half of a checkpoint is never seen
            try:
                os.replace(path, gone)
            except OSError as error:
                say(f"warning: {path} is not needed any more, and cannot be deleted ({error.strerror})")
            files.remove(gone)
            self.known.pop(path, None)


def needed(valid: Mapping[int, int | None], keep_last: int, best_step: int | None) -> set[int]:
    """The steps whose checkpoints are kept: the newest `keep_last` of the valid ones, the best, and the best that each
    of the kept knows of, to which a run may have to go back. `valid`: step -> that best."""
    last = sorted(valid)[-keep_last:]
    best: Iterable[int | None] = (best_step, *(valid[step] for step in last))
    return {*last, *(step for step in best if step is not None)}


def looks(path: Path) -> object:
    """What changes when somebody writes to a checkpoint's files."""
    facts = {name: os.lstat(path / name) for name in os.listdir(path)}
    return {name: (of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns) for name, of in facts.items()}


def best_of(path: Path) -> int | None:
    """The best step so far, as a valid checkpoint knows it; somebody's own may say anything."""
    try:
        return Progress.read(checkpoint.read_state(path)["progress"]).best_step
    except ValueError:
        return None
