"""A run in a process of its own, for the price of a fork.

A run costs seconds of imports and a fraction of a second of training. So the harness imports torch and minitune once,
computes nothing itself, and forks a child for each run. The child leads a session of its own, has its output in files,
and runs scripts/train.py as `python` would. What is to go wrong in it is planted before it starts.
"""

import atexit
import contextlib
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
PATIENCE = 120.0  # seconds for a run that takes one; a slower one hangs

Plant = Callable[[], None]


class Lost(AssertionError):
    """An injection that the run did not survive, in a sentence."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int  # as a shell tells it: 128 + n after a signal n
    out: str
    err: str
    seconds: float

    def said(self) -> str:
        return f"exit {self.code}: {(self.err or self.out).strip()[-400:]!r}"


class Run:
    """A run that has started."""

    def __init__(self, pid: int, written: Path) -> None:
        self.pid, self.written, self.started = pid, written, time.monotonic()

    def signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def over(self) -> bool:
        """Whether it has ended, and not been waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Wait for its end. Raises Lost, and ends it, if it takes longer than that."""
        while not self.over():
            if time.monotonic() - self.started > seconds:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Lost(f"not over after {seconds:.0f} s: {self.written.with_suffix('.err').read_text()[-300:]!r}")
            time.sleep(0.002)
        took = time.monotonic() - self.started
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (self.written.with_suffix(end).read_text(errors="replace") for end in (".out", ".err"))
        return Ended(status if status >= 0 else 128 - status, out, err, took)


def start(arguments: list[str], folder: Path, *plants: Plant, script: Path = TRAIN) -> Run:
    """Run `script` with `arguments` in a child; `plants` are called in it first. Its output is kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while (folder / f"{number}.out").exists():
        number += 1
    written = folder / str(number)
    written.with_suffix(".out").touch()
    written.with_suffix(".err").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Run(pid, written)
    os._exit(child(script, arguments, written, plants))


def child(script: Path, arguments: list[str], written: Path, plants: tuple[Plant, ...]) -> int:
    """What `python script arguments` does, from a process that has its imports; returns the exit code."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()
        for number, end in ((1, ".out"), (2, ".err")):
            file = os.open(written.with_suffix(end), os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        for plant in plants:
            plant()
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # as the interpreter's own end: wait for threads, then call what asked to be called
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    return code
