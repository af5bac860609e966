"""Rotation against a model of it: random sequences of saves, evaluations, damage and limits.

A sequence makes checkpoints of a few bytes and asks minitune to clear them away, as a run does after each save. The
model says, from what the harness itself did to each folder, which of them are valid, and what must be left.
"""

import json
import random
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mutants
from forked import Plant
from outcome import sha256
from rows import Case, Row, must

from minitune import checkpoint, saver
from minitune.progress import Progress

IN_A_CASE = 100  # sequences


@dataclass
class Model:
    """What is known of a run's checkpoints without looking at them."""

    step: int = 0
    keep_last: int = 3
    best: int | None = None
    knows: dict[int, int | None] = field(default_factory=dict)  # each checkpoint there -> the best step it knows of
    valid: set[int] = field(default_factory=set)

    def must_stay(self) -> set[int]:
        """The newest `keep_last` of the valid ones, the best, and the best that each of them knows of."""
        newest = set(sorted(self.valid)[-self.keep_last :])
        return newest | ({self.best, *(self.knows[step] for step in newest)} & self.valid)


def rotate_often(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    for plant in mutant:
        plant()
    for number in range(IN_A_CASE):
        run = case.folder / str(number)
        (run / "checkpoints").mkdir(parents=True)
        sequence(run, random.Random(f"{case.draw.random()} {number}"))
        shutil.rmtree(run)


def sequence(run: Path, draw: random.Random) -> None:
    """A run's life in a dozen events."""
    model, shelf, events = Model(), saver.Shelf(run), []
    for _ in range(draw.randint(4, 14)):
        event = draw.choice(("save", "save", "save", "evaluate", "damage", "limit", "restart", "lose"))
        events.append(event)
        match event:
            case "evaluate":  # the next save is of a new best
                model.best = model.step + 1
                save(run, model)
            case "save":
                save(run, model)
            case "damage" if model.knows:
                damage(run, model, draw.choice(sorted(model.knows)), draw)
                continue
            case "lose" if model.knows:  # somebody deletes one
                step = draw.choice(sorted(model.knows))
                shutil.rmtree(folder(run, step))
                model.knows.pop(step)
                model.valid.discard(step)
                continue
            case "limit":
                model.keep_last = draw.randint(1, 4)
                continue
            case "restart":  # from the newest valid one; those above it are damaged, and set aside
                shelf = saver.Shelf(run)
                model.step = max(model.valid, default=0)
                model.best = model.knows.get(model.step)
                for step in [step for step in model.knows if step > model.step]:
                    checkpoint.set_aside(folder(run, step))
                    del model.knows[step]
                continue
            case _:
                continue
        stays = model.must_stay()
        shelf.clear(model.keep_last, model.best)
        there = {int(path.name[5:]) for path in (run / "checkpoints").glob("step-??????")}
        must(stays <= there, f"deleted {sorted(stays - there)} after {events}: {model}")
        extra = (there & model.valid) - stays
        must(not extra, f"kept {sorted(extra)} after {events}: {model}")
        must(max(model.valid) == max(there & model.valid), f"the newest valid one is gone after {events}")
        model.knows = {step: model.knows[step] for step in there}
        model.valid &= there


def save(run: Path, model: Model) -> None:
    """A checkpoint of the next step, small, and right in all that is looked at."""
    model.step += 1
    path = folder(run, model.step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name in ("trained.safetensors", "optimizer.safetensors"):
        (path / name).write_bytes(b"weights")
    progress = Progress(step=model.step, best_step=model.best, best_loss=None if model.best is None else 1.0)
    state = {"step": model.step, "optimizer": {}, "identity": {}, "progress": vars(progress)}
    (path / "state.json").write_text(json.dumps(state))
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    model.knows[model.step] = model.best
    model.valid.add(model.step)


def damage(run: Path, model: Model, step: int, draw: random.Random) -> None:
    file = draw.choice(sorted(folder(run, step).iterdir()))
    match draw.choice(("edit", "cut", "delete", "empty")):
        case "edit":
            data = bytearray(file.read_bytes() or b".")
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "delete":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
    model.valid.discard(step)
    if len(list(folder(run, step).iterdir())) == 0:
        model.knows.pop(step)


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


ROWS = [
    Row(
        "sequences of rotation",
        rotate_often,
        partial(rotate_often, mutant=(mutants.delete_by_number,)),
        full=10_000 // IN_A_CASE,
        pr=2,
        controls=1,
        weight=IN_A_CASE,
    )
]
