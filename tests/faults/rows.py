"""A row of the table: a kind of fault, how often it is injected, and its negative control."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forked import Ended, Lost
from outcome import checkpoints
from world import World


@dataclass(frozen=True)
class Case:
    """One injection: its number among those of its row, its own draws, its own empty folder."""

    world: World
    index: int
    count: int
    draw: random.Random
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def go_on_from(self, method: str) -> list[Path]:
        """Begin with a copy of the run that was killed; returns its checkpoints, all valid, oldest first."""
        shutil.copytree(self.world.stopped[method], self.run)
        return checkpoints(self.run)


@dataclass(frozen=True)
class Row:
    name: str
    inject: Callable[[Case], None]  # raises Lost where the run does not survive
    control: Callable[[Case], None] | None  # the same with a guard taken out: must raise Lost. None: a peer's row
    full: int  # injections in the full tier
    pr: int  # and in that of a pull request
    controls: int = 3  # injections of the control
    weight: int = 1  # of one injection in the count, where it is many in one
    system: str = "minitune"


def must(condition: object, sentence: str) -> None:
    if not condition:
        raise Lost(sentence)


def must_end_well(ended: Ended) -> None:
    must(ended.code == 0 and "Traceback" not in ended.err, ended.said())


def must_refuse(ended: Ended, codes: tuple[int, ...] = (1, 2)) -> None:
    """One clear message on stderr, no traceback, and an exit code of those."""
    must(ended.code in codes, ended.said())
    must(ended.err.strip() and "Traceback" not in ended.err + ended.out, f"no clear message: {ended.said()}")
