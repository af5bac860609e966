"""SIGTERM and SIGINT, once and twice, at any moment: the step is finished and saved, and the run ends as asked."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mutants
from forked import Ended, Plant
from kills import litter, method_of, must_have_kept, noter
from outcome import last_step, must_equal, valid
from points import REAL, Point, before_call, is_save, watch
from rows import Case, Row, must, must_end_well
from world import STEPS

from minitune import build, peft_format, train

WHERE = ("any", "step", "save", "before", "any", "evaluation", "save", "export", "any", "step")
IN_THE_LOOP = ("step", "save", "evaluation")
SECONDS = 10.0  # that a run has to save and go


def one_signal(case: Case, where: tuple[str, ...] = WHERE, mutant: tuple[Plant, ...] = ()) -> None:
    """One signal: 143 or 130 within ten seconds, with a checkpoint of the last step; then the run goes on."""
    method, signum = method_of(case.index), signal_of(case)
    ended = signalled(case, method, where[case.index % len(where)], [signum], mutant)
    must("Traceback" not in ended.err, ended.said())
    must_have_heeded(case)
    step = last_step(case.run)
    if not finished(case.run):
        must(ended.code == 128 + signum, f"not the exit of signal {signum}: {ended.said()}")
        must(valid(case.run)[-1:] == [step] or step == 0, f"stopped at step {step}, saved {valid(case.run)}")
    else:  # too late to stop anything
        must(ended.code in (0, 128 + signum) and step == STEPS, ended.said())
    goes_on(case, method)


def two_signals(case: Case, where: tuple[str, ...] = WHERE, mutant: tuple[Plant, ...] = ()) -> None:
    """A second one up to 50 ms after the first stops the run at once; what had been saved is whole."""
    method, first, second = method_of(case.index), signal_of(case), case.draw.choice([signal.SIGTERM, signal.SIGINT])
    ended = signalled(case, method, where[case.index % len(where)], [first, second], mutant)
    must("Traceback" not in ended.err, ended.said())
    must_have_heeded(case)
    if not finished(case.run):
        must(ended.code in (128 + first, 128 + second), f"not the exit of a signal: {ended.said()}")
    must_have_kept(case)
    goes_on(case, method)


def signalled(case: Case, method: str, where: str, signums: list[int], mutant: tuple[Plant, ...]) -> Ended:
    """Run until these signals end it; they come from outside at any moment, or from a fault point inside."""
    if where != "any":
        return case.world.run(case.run, method, *mutant, *planted(case, method, where, partial(send, case, signums)))
    run = case.world.start(case.run, method, *mutant, *planted(case, method, where, lambda: None))
    time.sleep(case.world.seconds[method] * case.draw.uniform(0.05, 1.0))
    note_the_moment(case)
    for signum in signums:
        run.signal(signum)
        time.sleep(case.draw.uniform(0, 0.05))
    return run.wait()


def planted(case: Case, method: str, where: str, act: Callable[[], None]) -> list[Plant]:
    """Call `act` in the run at such a moment, and leave word of each checkpoint."""
    note = noter(case)
    points = [n for n, line in enumerate(case.world.points[method], start=1) if " checkpoints" in line]
    at = case.draw.choice(points) if where == "save" else 0

    def before(point: Point) -> None:
        if point.number == at:
            act()

    def after(point: Point) -> None:
        if is_save(point):
            note()

    moments = {
        "before": [(train, "prepare", 1), (build, "compose", 1), (build, "fill", 1)],
        "step": [(train, "take_step", nth) for nth in range(1, STEPS + 1)],
        "evaluation": [(train, "evaluate", nth) for nth in range(1, 5)],
        "export": [(train.pretrained, "full_state", 1) if method == "full" else (peft_format, "save", 1)],
    }
    here = [before_call(*case.draw.choice(moments[where]), act)] if where in moments else []
    return [watch(case.run, before, after), *here]


def send(case: Case, signums: list[int]) -> None:
    """Signal this very process; a second signal comes from a process beside it, a moment later."""
    note_the_moment(case)
    os.kill(os.getpid(), signums[0])
    if len(signums) > 1 and os.fork() == 0:
        time.sleep(case.draw.uniform(0, 0.05))
        os.kill(os.getppid(), signums[1])
        os._exit(0)


def signal_of(case: Case) -> int:
    return (signal.SIGTERM, signal.SIGINT)[case.index // 2 % 2]


def note_the_moment(case: Case) -> None:
    """Leave word of when the signal comes, and after which step."""
    handle = REAL["open"](case.folder / "asked", os.O_WRONLY | os.O_CREAT)
    REAL["write"](handle, f"{time.monotonic()} {last_step(case.run)}".encode())
    os.close(handle)


def must_have_heeded(case: Case) -> None:
    """The run has stopped in time, and after the step it was at (or the next: it may have been at its end)."""
    when, step = (case.folder / "asked").read_text().split()
    must((took := time.monotonic() - float(when)) < SECONDS, f"took {took:.1f} s to stop")
    must(last_step(case.run) <= int(step) + 2, f"asked to stop after step {step}, it went on to {last_step(case.run)}")


def finished(run: Path) -> bool:
    try:
        return bool(json.loads((run / "run.json").read_text()).get("finished"))
    except OSError:
        return False


def goes_on(case: Case, method: str) -> None:
    must_end_well(case.world.run(case.run, method))
    must_equal(case.run, case.world.straight[method])
    must(not (left := litter(case.run)), f"left behind: {', '.join(left)}")


ROWS = [
    Row(
        "SIGTERM or SIGINT",
        one_signal,
        partial(one_signal, where=IN_THE_LOOP, mutant=(mutants.deaf,)),
        full=34,
        pr=10,
    ),
    Row(
        "SIGTERM or SIGINT, and another",
        two_signals,
        partial(two_signals, where=IN_THE_LOOP, mutant=(mutants.deaf,)),
        full=16,
        pr=5,
    ),
]
