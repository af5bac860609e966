"""Fault points: every call by which a run changes its files, counted, so that something can happen at the n-th.

`watch` is planted in a run. It puts itself before the file system calls of `os`, before files that are opened to be
written (each write has a point before it and one in its middle) and before safetensors' writer, which works beneath
Python. Threads count together.
"""

import builtins
import io
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "chmod", "truncate")
BY_HANDLE = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate", "fchmod", "sendfile", "copy_file_range")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

REAL = {name: getattr(os, name) for name in ("open", *BY_PATH, *BY_HANDLE)}


@dataclass(frozen=True)
class Point:
    """A call that is about to be made, or a write that is half done."""

    number: int  # the first is 1
    name: str
    path: str  # what it changes; of a rename the new name
    source: str = ""  # of a rename the old one


def nothing(point: Point) -> None:
    """What happens at a point by default."""


def watch(
    root: Path, before: Callable[[Point], None] = nothing, after: Callable[[Point], None] = nothing
) -> Callable[[], None]:
    """The plant that calls `before` and `after` around every change of a file under `root`."""

    def plant() -> None:
        Watch(os.path.realpath(root), before, after).install()

    return plant


class Watch:
    def __init__(self, root: str, before: Callable[[Point], None], after: Callable[[Point], None]) -> None:
        self.root, self.before, self.after = root, before, after
        self.lock, self.count = threading.RLock(), 0

    def install(self) -> None:
        os.open = self.opening
        for name in BY_PATH:
            setattr(os, name, self.by_path(REAL[name], name))
        for name in BY_HANDLE:
            setattr(os, name, self.by_handle(REAL[name], name))
        builtins.open = io.open = self.opened
        import safetensors.torch

        safetensors.torch.save_file = self.save_file

    def point(self, name: str, path: str, source: str = "") -> Point | None:
        """Count a point under the root, and let happen what is to happen there."""
        if not (path == self.root or path.startswith(self.root + "/")):
            return None
        with self.lock:
            self.count += 1
            point = Point(self.count, name, path, source)
            self.before(point)
        return point

    def done(self, point: Point | None) -> None:
        if point:
            with self.lock:
                self.after(point)

    def by_path(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        takes_two = name in ("rename", "replace", "link", "symlink")

        def call(*arguments: Any, **options: Any) -> Any:
            folder = options.get("dst_dir_fd" if takes_two else "dir_fd")
            source = absolute(arguments[0]) if takes_two else ""
            point = self.point(name, absolute(arguments[1 if takes_two else 0], folder), source)
            value = real(*arguments, **options)
            self.done(point)
            return value

        return call

    def by_handle(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            handle = arguments[1 if name == "copy_file_range" else 0]
            point = self.point(name, of_handle(handle))
            value = real(*arguments, **options)
            self.done(point)
            return value

        return call

    def opening(self, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        writes = flags & WRITES and not flags & os.O_DIRECTORY
        point = self.point("open", absolute(path, options.get("dir_fd"))) if writes else None
        handle = REAL["open"](path, flags, *arguments, **options)
        self.done(point)
        return handle

    def opened(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        """The builtin `open`; a file under the root that is to be written gets points of its own."""
        path = of_handle(file) if isinstance(file, int) else absolute(file)
        if not set(mode) & set("wax+") or not path.startswith(self.root + "/"):
            return REAL_OPEN(file, mode, buffering, *text, **options)
        closefd, opener = options.pop("closefd", True), options.pop("opener", None)
        point = self.point("open", path)
        raw = WatchedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.watch, raw.path = self, path
        self.done(point)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, *text, line_buffering=buffering == 1, **options)

    def save_file(self, tensors: dict[str, Any], filename: Any, metadata: dict[str, str] | None = None) -> None:
        """safetensors' writer, call by call: a file of a random name, written, renamed."""
        from safetensors.torch import save

        part = Path(filename).with_name(f".tmp{os.urandom(3).hex()}")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with self.opened(handle, "wb") as file:
            file.write(save(tensors, metadata))
        os.rename(part, filename)


class WatchedFile(io.FileIO):
    watch: Watch
    path: str

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        point = self.watch.point("write", self.path)
        written = super().write(view[:half])
        if written == half:
            self.watch.point("torn write", self.path)
            written += super().write(view[half:])
        self.watch.done(point)
        return written


REAL_OPEN = io.open


def absolute(path: Any, folder: int | None = None) -> str:
    if isinstance(path, int):
        return of_handle(path)
    path = os.fsdecode(path)
    if folder is not None:
        path = os.path.join(of_handle(folder), path)
    return os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))


def of_handle(handle: int) -> str:
    """The path that a file descriptor was opened under, by its present name."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return ""


# ---- what may happen at a point ------------------------------------------------------------------------------------


def die(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def is_save(point: Point) -> bool:
    """Whether a point is the rename by which a checkpoint appears."""
    return (
        point.name in ("rename", "replace") and re.fullmatch(r"step-\d{6,}", os.path.basename(point.path)) is not None
    )


def count_points(run: Path, told: Path) -> Callable[[], None]:
    """The plant that writes a line to `told` for every point under `run`: its name and its path in the run."""
    handle = REAL["open"](told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    root = os.path.realpath(run)

    def before(point: Point) -> None:
        REAL["write"](handle, f"{point.name} {os.path.relpath(point.path, root)}\n".encode())

    return watch(run, before)


def before_call(module: Any, name: str, nth: int, act: Callable[[], None]) -> Callable[[], None]:
    """The plant that does something when `module.name` is called for the n-th time, before it begins."""

    def plant() -> None:
        real, calls = getattr(module, name), []

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == nth:
                act()
            return real(*arguments, **options)

        setattr(module, name, call)

    return plant
