"""kill -9 and power cuts, at random moments and at every call of a save: the run that goes on is the straight one."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mutants
from forked import Plant
from outcome import must_equal, valid
from points import REAL, Point, die, is_save, watch
from power import fail_power_at
from rows import Case, Row, must, must_end_well
from world import METHODS

KILLED = 128 + signal.SIGKILL


def method_of(index: int) -> str:
    return ("lora", "qlora", "lora", "full")[index % 4]


def kill_at_random(case: Case, once_saved: bool = False, mutant: tuple[Plant, ...] = (), method: str = "") -> None:
    """kill -9 at a random moment of the run; a fifth of the runs is killed twice, and of these a fifth thrice.

    The tokenised data is made anew for it, so that it may also be killed in the making.
    `once_saved`: as soon as there is a checkpoint, for the control.
    """
    method = method or method_of(case.index)
    own_cache = (f"data.cache={case.folder / 'cache'}",)
    while True:
        run = case.world.start(case.run, method, witness(case), *mutant, overrides=own_cache)
        if once_saved:
            while not valid(case.run) and not run.over():
                time.sleep(0.005)
        else:
            time.sleep(case.world.seconds[method] * case.draw.random())
        run.signal(signal.SIGKILL)
        if run.wait().code != KILLED:  # it was over: too late
            start_over(case)
            continue
        must_have_kept(case)
        if case.draw.random() < 0.8:
            break
    must_go_on(case, method, *mutant, overrides=own_cache)


def kill_inside_a_save(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """kill -9 at one of the calls, or in one of the writes, by which the run's checkpoints come to be and go."""
    method = method_of(case.index)
    points = case.world.points[method]
    at = case.draw.choice([n for n, line in enumerate(points, start=1) if " checkpoints" in line])
    kill_at_point(case, method, at, mutant)


def kill_inside_other_writes(case: Case, of: str = "", mutant: tuple[Plant, ...] = ()) -> None:
    """kill -9 at one of the calls that change the run's other files: lock, recipe, metrics, run.json, the adapter."""
    method = method_of(case.index)
    points = case.world.points[method]
    at = case.draw.choice([n for n, line in enumerate(points, start=1) if " checkpoints" not in line and of in line])
    kill_at_point(case, method, at, mutant)


def kill_at_point(case: Case, method: str, at: int, mutant: tuple[Plant, ...]) -> None:
    note = noter(case)

    def before(point: Point) -> None:
        if point.number == at:
            die()

    def after(point: Point) -> None:
        if is_save(point):
            note()

    ended = case.world.run(case.run, method, *mutant, watch(case.run, before, after))
    must(ended.code in (KILLED, 0), ended.said())
    must_have_kept(case)
    must_go_on(case, method, *mutant)


def cut_power(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """A power cut inside a save, in turns with one inside another write or at the end of the run: what no fsync has
    made safe is lost. See power.py."""
    method = method_of(case.index)
    saves, others = [], [0]
    for number, line in enumerate(case.world.points[method], start=1):
        (saves if " checkpoints" in line else others).append(number)
    at = case.draw.choice(others if case.index % 3 == 2 else saves) if case.index % 12 != 11 else 0
    note, seen = noter(case), []

    def noted(point: Point) -> None:
        if is_save(point):
            seen.append(point)
        if len(seen) > 1:  # so the one before should have been made safe
            note()

    draw = random.Random(case.draw.random())
    cut = fail_power_at(at, case.run, case.folder / "stash", draw, noted)
    case.world.run(case.run, method, cut, *mutant)
    must_have_kept(case)
    must_go_on(case, method, *mutant)


def start_over(case: Case) -> None:
    shutil.rmtree(case.run, ignore_errors=True)
    (case.folder / "saved").unlink()


def noter(case: Case) -> Callable[[], None]:
    """A function by which the run leaves word that it has a checkpoint now."""
    handle = os.open(case.folder / "saved", os.O_WRONLY | os.O_CREAT)
    return lambda: REAL["pwrite"](handle, b"1", 0)


def witness(case: Case) -> Plant:
    note = noter(case)
    return watch(case.run, after=lambda point: note() if is_save(point) else None)


def must_have_kept(case: Case) -> None:
    """Where there once was a valid checkpoint there is one now."""
    if (case.folder / "saved").stat().st_size:
        must(valid(case.run), "no valid checkpoint is left, though there had been one")


def must_go_on(case: Case, method: str, *mutant: Plant, overrides: tuple[str, ...] = ()) -> None:
    """The run, started again, ends as the straight one, and leaves nothing half-made behind."""
    must_end_well(case.world.run(case.run, method, *mutant, overrides=overrides))
    must_equal(case.run, case.world.straight[method])
    must(not (left := litter(case.run)), f"left behind: {', '.join(left)}")


def litter(run: Path) -> list[str]:
    """What only a run under way may have in its folder."""
    return [path.name for path in run.rglob(".*") if path.suffix in (".part", ".old", ".tmp") or ".tmp" in path.name]


ROWS = [
    Row(
        "kill -9 at a random moment",
        kill_at_random,
        partial(kill_at_random, once_saved=True, mutant=(mutants.forget_moments,), method=METHODS[0]),
        full=100,
        pr=8,
    ),
    Row(
        "kill -9 inside a save",
        kill_inside_a_save,
        partial(kill_inside_a_save, mutant=(mutants.write_in_place, mutants.trust_all)),
        full=100,
        pr=12,
        controls=8,
    ),
    Row(
        "kill -9 inside other writes",
        kill_inside_other_writes,
        partial(kill_inside_other_writes, of="write .run.json", mutant=(mutants.no_sweep,)),
        full=40,
        pr=6,
        controls=8,
    ),
    Row(
        "power cut",
        cut_power,
        partial(cut_power, mutant=(mutants.no_fsync,)),
        full=96,
        pr=12,
        controls=8,
    ),
]
