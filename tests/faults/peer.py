"""The same injections into HF Trainer + PEFT, on the rows that apply.

They are judged by what matters in the end, and more leniently than minitune: a run survives if, started again, it
ends well with the losses and weights of the straight run. Whether damage was noticed, and how the run exited, is not
asked; of a signal, that within ten seconds there is a checkpoint of the last step.
"""

import io
import json
import os
import re
import shutil
import signal
import time
from functools import cache
from pathlib import Path
from typing import Any

import forked
import peer_run
import torch
from corruption import HARMS
from forked import Ended, Lost, Plant, Run
from kills import KILLED
from outcome import sha256, tree
from peer_run import STEPS
from points import Point, before_call, count_points, die, watch
from rows import Case, Row, must
from transformers import Trainer
from world import World

SCRIPT = Path(peer_run.__file__)
SYSTEM = "HF Trainer + PEFT"


def start(world: World, run: Path, *plants: Plant) -> Run:
    arguments = [str(world.folder / "base"), str(world.folder / "rows.jsonl"), str(run)]
    return forked.start(arguments, run.with_name(run.name + ".said"), *plants, script=SCRIPT)


@cache
def straight(folder: Path) -> tuple[Any, str, float, list[str]]:
    """History, weights, seconds and fault points of a run that nothing happens to; made once by each worker."""
    run = folder / f"peer-{os.getpid()}"
    ended = start(World(folder, {}, {}, {}, {}), run, by_python, count_points(run, run.with_suffix(".points")))
    ended = ended.wait()
    if ended.code:
        raise RuntimeError(f"the peer's straight run failed: {ended.said()}")
    return *result(run), ended.seconds, run.with_suffix(".points").read_text().splitlines()


def result(run: Path) -> tuple[Any, str]:
    return json.loads((run / "history.json").read_text()), sha256(run / "final" / "adapter_model.safetensors")


def by_python() -> None:
    """torch.save through a Python file, so that its writes have fault points."""
    real = torch.save

    def save(value: Any, path: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(path, io.IOBase):
            real(value, path, *arguments, **options)
            return
        with open(path, "wb") as file:
            real(value, file, *arguments, **options)

    torch.save = save


def must_go_on(case: Case, *plants: Plant) -> None:
    ended = start(case.world, case.run, *plants).wait()
    error = re.sub(r"checkpoint-\d+", "checkpoint-N", (ended.err.strip().splitlines() or ["?"])[-1])
    must(ended.code == 0, f"started again, it fails: {error[:200]}")
    try:
        history, weights = result(case.run)
    except (OSError, ValueError) as error:
        raise Lost(f"no result: {error}") from None
    must(len(history) == STEPS, f"trains {len(history)} steps in place of {STEPS}")
    must((history, weights) == straight(case.world.folder)[:2], "differs silently from the straight run")


def kill_at_random(case: Case) -> None:
    seconds = straight(case.world.folder)[2]
    while True:
        run = start(case.world, case.run)
        time.sleep(seconds * case.draw.random())
        run.signal(signal.SIGKILL)
        if run.wait().code == KILLED:
            break
        shutil.rmtree(case.run)  # it was over: too late
    must_go_on(case)


def kill_inside_a_save(case: Case) -> None:
    points = straight(case.world.folder)[3]
    at = case.draw.choice([n for n, line in enumerate(points, start=1) if " checkpoint-" in line])

    def before(point: Point) -> None:
        if point.number == at:
            die()

    start(case.world, case.run, by_python, watch(case.run, before)).wait()
    must_go_on(case)


def send_a_signal(case: Case) -> None:
    """In the middle of training, at half a second a step: their checkpoint on SIGTERM waits for three seconds."""
    run = start(case.world, case.run, slowly)
    while not any(case.run.glob("checkpoint-*")) and not run.over():
        time.sleep(0.01)
    time.sleep(case.draw.uniform(0, 1))
    asked = time.monotonic()
    run.signal((signal.SIGTERM, signal.SIGINT)[case.index % 2])
    ended = run.wait()
    must(time.monotonic() - asked < 10, "not over after ten seconds")
    steps = [int(path.name[11:]) for path in case.run.glob("checkpoint-*")]
    must(
        steps and max(steps) >= stopped_at(ended), f"no checkpoint of step {stopped_at(ended)}, but of {sorted(steps)}"
    )
    must_go_on(case)


def slowly() -> None:
    real = Trainer.training_step

    def training_step(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.25)
        return real(*arguments, **options)

    Trainer.training_step = training_step


def stopped_at(ended: Ended) -> int:
    """The last step whose loss was printed."""
    return ended.out.count("'loss'")


def corrupt(case: Case) -> None:
    older, newest = stopped(case)
    names = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    name = (*names, "training_args.bin")[case.index % 6]
    HARMS[case.index // 6 % 4](newest / name, older)
    must_go_on(case)


def edit_a_byte(case: Case) -> None:
    _, newest = stopped(case)
    files = sorted(path for path in newest.iterdir() if path.is_file())
    at = case.draw.randrange(sum(file.stat().st_size for file in files))
    while at >= files[0].stat().st_size:
        at -= files.pop(0).stat().st_size
    data = bytearray(files[0].read_bytes())
    data[at] ^= case.draw.randrange(1, 256)
    files[0].write_bytes(data)
    must_go_on(case)


def stopped(case: Case) -> list[Path]:
    """A run killed after nine steps; the two newest of its checkpoints."""
    start(case.world, case.run, before_call(Trainer, "training_step", 19, die)).wait()
    found = sorted(case.run.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    must(len(found) >= 2, "it had no two checkpoints")
    return found[-2:]


def restart(case: Case) -> None:
    start(case.world, case.run).wait()
    before = tree(case.run)
    start(case.world, case.run).wait()
    changed = {name for name in before | tree(case.run) if before.get(name) != tree(case.run).get(name)}
    must(not changed, f"changed: {', '.join(sorted(changed)[:5])}")
    must_go_on(case)


def row(name: str, inject: Any, count: int) -> Row:
    return Row(name, inject, None, full=count, pr=0, controls=0, system=SYSTEM)


ROWS = [
    row("kill -9 at a random moment", kill_at_random, 40),
    row("kill -9 inside a save", kill_inside_a_save, 40),
    row("SIGTERM or SIGINT", send_a_signal, 20),
    row("corruption of the newest checkpoint", corrupt, 24),
    row("byte edits of the newest checkpoint", edit_a_byte, 40),
    row("finished runs started again", restart, 3),
]
