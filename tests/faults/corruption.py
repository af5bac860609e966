"""The newest checkpoint damaged: always noticed, named, set aside, and the one before it used. The best one replaced by
another run's: noticed and named, and the last weights handed over in its place."""

import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mutants
from forked import Lost, Plant
from outcome import HANDED_OVER, checkpoints, last_step, must_equal, valid
from points import before_call, die
from rows import Case, Row, must, must_end_well
from safetensors.torch import load_file
from world import METHODS, STEPS

from minitune import train


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


# ---- the best one --------------------------------------------------------------------------------------------------

BEST = 3  # the step of the first evaluation


def best_first() -> None:
    """No evaluation after the first finds anything better."""
    losses = itertools.chain([1.0], itertools.repeat(2.0))
    train.evaluate = lambda *arguments: next(losses)


def none_better() -> None:
    """The evaluations of a run that goes on from there."""
    train.evaluate = lambda *arguments: 2.0


def swap_the_best(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """Whole, of the same step and shapes, and of a run with another seed. Half of the runs have come to their last
    save when it happens, and only hand over."""
    method = METHODS[case.index % len(METHODS)]
    place, step = ((train, "take_step"), 10) if case.index % 2 else ((train, "hand_over"), 1)
    other = case.folder / "other"
    for run, overrides in ((case.run, ()), (other, ("seed=4",))):
        case.world.run(run, method, best_first, before_call(*place, step, die), overrides=overrides)
        must(BEST in valid(run) and max(valid(run)) > BEST, f"{run.name} has checkpoints {valid(run)}")
    best = case.run / "checkpoints" / f"step-{BEST:06d}"
    shutil.rmtree(best)
    shutil.copytree(other / "checkpoints" / best.name, best)
    ended = case.world.run(case.run, method, none_better, *mutant)
    must_end_well(ended)
    must_have_handed_over(case.run, checkpoints(case.run)[-1])
    must(f"warning: the best checkpoint, {best.name}" in ended.out, f"not said: {ended.said()}")
    must(last_step(case.run) == STEPS, f"ended at step {last_step(case.run)}")


def must_have_handed_over(run: Path, checkpoint: Path) -> None:
    """What the run has made holds just the numbers of one of its checkpoints."""
    [file] = [run / name for name in HANDED_OVER if (run / name).exists()]
    made, saved = load_file(file), load_file(checkpoint / "trained.safetensors")
    for name, tensor in saved.items():
        found = made[name] if name in made else made[f"base_model.model.{name}.weight"]
        if not found.equal(tensor):
            raise Lost(f"{name} that was handed over is not that of {checkpoint.name}")
    must(len(made) == len(saved), f"{len(made)} tensors handed over, {len(saved)} in {checkpoint.name}")


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
    Row(
        "the best checkpoint swapped for that of another run",
        swap_the_best,
        partial(swap_the_best, mutant=(mutants.take_any_best,)),
        full=12,
        pr=3,
    ),
]
