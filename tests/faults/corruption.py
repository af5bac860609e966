"""The newest checkpoint damaged: always noticed, named, set aside, and the one before it used."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mutants
from forked import Plant
from outcome import must_equal
from rows import Case, Row, must, must_end_well
from world import METHODS


def truncate(file: Path, older: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])


def zero(file: Path, older: Path) -> None:
    """A block that never reached the disk."""
    data = bytearray(file.read_bytes())
    start = len(data) // 2
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    file.write_bytes(data)


def flip(file: Path, older: Path) -> None:
    """One bit, near the end, where the numbers are."""
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)


def delete(file: Path, older: Path) -> None:
    file.unlink()


def empty(file: Path, older: Path) -> None:
    file.write_bytes(b"")


def swap(file: Path, older: Path) -> None:
    """The file of an older checkpoint: whole, and not of this one."""
    file.write_bytes((older / file.name).read_bytes())


HARMS: list[Callable[[Path, Path], None]] = [truncate, zero, flip, delete, empty, swap]


def corrupt(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """Each file in each way, the methods in turn."""
    method = METHODS[case.index % len(METHODS)]
    *_, older, newest = case.go_on_from(method)
    files = sorted(newest.iterdir())
    HARMS[case.index // len(files) % len(HARMS)](files[case.index % len(files)], older)
    must_fall_back(case, method, older, newest, *mutant)


def edit_a_byte(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """Another value for one byte anywhere in it."""
    method = METHODS[case.index % len(METHODS)]
    *_, older, newest = case.go_on_from(method)
    files = sorted(newest.iterdir())
    at = case.draw.randrange(sum(file.stat().st_size for file in files))
    while at >= files[0].stat().st_size:
        at -= files.pop(0).stat().st_size
    data = bytearray(files[0].read_bytes())
    data[at] ^= case.draw.randrange(1, 256)
    files[0].write_bytes(data)
    must_fall_back(case, method, older, newest, *mutant)


def must_fall_back(case: Case, method: str, older: Path, newest: Path, *mutant: Plant) -> None:
    ended = case.world.run(case.run, method, *mutant)
    must_end_well(ended)
    must(newest.name in ended.out and any(newest.parent.glob(f"{newest.name}.bad*")), f"not noticed: {ended.said()}")
    must(f"from {older.name}" in ended.out, f"not gone on from {older.name}: {ended.said()}")
    must_equal(case.run, case.world.straight[method])


ROWS = [
    Row(
        "corruption of the newest checkpoint",
        corrupt,
        partial(corrupt, mutant=(mutants.trust_all,)),
        full=24,
        pr=12,
    ),
    Row(
        "byte edits of the newest checkpoint",
        edit_a_byte,
        partial(edit_a_byte, mutant=(mutants.trust_all,)),
        full=100,
        pr=8,
    ),
]
