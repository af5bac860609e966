"""A disk that loses, when the power fails, all that no fsync has made safe: the worst that POSIX allows.

kill -9 leaves the page cache alone, so it cannot tell whether files are flushed before they are renamed. Here data
that was written and not fsynced is cut or zeroed, and names that were made, moved or removed in a folder that has not
been fsynced since are as they were.
"""

import atexit
import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

from points import REAL, Point, die, watch


class Disk:
    def __init__(self, root: Path, stash: Path, draw: random.Random) -> None:
        self.root, self.stash, self.draw = root, stash, draw
        self.safe_length: dict[int, int] = {}  # inode of a file with unsafe data -> how much of it is safe
        self.unsafe_names: list[tuple[int, Callable[[], None]]] = []  # folder's inode, how to undo
        self.again: dict[int, int] = {}  # a folder that was made anew -> its inode now
        self.kept = 0

    def before(self, point: Point) -> None:
        """Remember what a call is about to take away, and how to undo it."""
        parent, name = os.path.split(point.path)
        match point.name:
            case "mkdir":
                self.undo_in(parent, name, REAL["rmdir"])
            case "open" if not os.path.lexists(point.path):
                self.undo_in(parent, name, REAL["unlink"])
            case "write" | "pwrite" | "writev" | "sendfile" | "copy_file_range":
                self.safe_length.setdefault(os.stat(point.path).st_ino, os.path.getsize(point.path))
            case "rmdir":
                self.removed_folder(parent, name, os.stat(point.path).st_ino)
            case "unlink" | "remove":
                self.removed(parent, name)
            case "rename" | "replace":
                if os.path.isfile(point.path):
                    self.removed(parent, name)
                self.moved(point.source, point.path)

    def after(self, point: Point) -> None:
        match point.name:
            case "open" | "truncate" | "ftruncate":  # what was there before is gone from it
                size, inode = os.path.getsize(point.path), os.stat(point.path).st_ino
                if size < self.safe_length.get(inode, 1):
                    self.safe_length[inode] = size
            case "fsync" | "fdatasync":
                inode = os.stat(point.path).st_ino
                self.safe_length.pop(inode, None)
                self.unsafe_names = [(folder, undo) for folder, undo in self.unsafe_names if folder != inode]

    def undo_in(self, parent: str, name: str, undo: Callable[[str], None]) -> None:
        folder = os.stat(parent).st_ino
        self.unsafe_names.append((folder, lambda: undo(os.path.join(self.where(folder), name))))

    def removed(self, parent: str, name: str) -> None:
        self.kept += 1
        keep = self.stash / str(self.kept)
        REAL["link"](os.path.join(parent, name), keep)
        self.undo_in(parent, name, lambda path: REAL["link"](keep, path))

    def removed_folder(self, parent: str, name: str, inode: int) -> None:
        def make_anew(path: str) -> None:
            REAL["mkdir"](path)
            self.again[inode] = os.stat(path).st_ino

        self.undo_in(parent, name, make_anew)

    def moved(self, source: str, target: str) -> None:
        old, new = os.stat(os.path.dirname(source)).st_ino, os.stat(os.path.dirname(target)).st_ino
        old_name, new_name = os.path.basename(source), os.path.basename(target)

        def back() -> None:
            REAL["rename"](os.path.join(self.where(new), new_name), os.path.join(self.where(old), old_name))

        self.unsafe_names.append((new, back))

    def where(self, inode: int) -> str:
        """The present path of a folder."""
        inode = self.again.get(inode, inode)
        for folder, _, _ in os.walk(self.root):
            if os.stat(folder).st_ino == inode:
                return folder
        raise FileNotFoundError(f"folder {inode} is gone")

    def cut_power(self) -> None:
        """Lose what is not safe, and die."""
        for folder, _, names in os.walk(self.root):
            for path in (os.path.join(folder, name) for name in names):
                safe = self.safe_length.get(os.lstat(path).st_ino)
                if safe is not None:
                    self.lose_data(path, safe)
        for _, undo in reversed(self.unsafe_names):
            with contextlib.suppress(OSError):  # in a folder that is itself gone by now
                undo()
        die()

    def lose_data(self, path: str, safe: int) -> None:
        size = os.path.getsize(path)
        REAL["truncate"](path, self.draw.randint(safe, size) if self.draw.random() < 0.5 else safe)
        if self.draw.random() < 0.5:
            REAL["truncate"](path, size)  # its length was safe, its blocks were not: they read as zeros


def fail_power_at(
    number: int, run: Path, stash: Path, draw: random.Random, noted: Callable[[Point], None]
) -> Callable[[], None]:
    """The plant that cuts the power at the n-th point under `run`, or (0) when the run has come to its end; `noted` is
    told of each point before."""
    stash.mkdir(parents=True, exist_ok=True)
    disk = Disk(run, stash, draw)

    def before(point: Point) -> None:
        if point.number == number:
            disk.cut_power()
        noted(point)
        disk.before(point)

    def plant() -> None:
        watch(run, before, disk.after)()
        if number == 0:
            atexit.register(disk.cut_power)

    return plant
