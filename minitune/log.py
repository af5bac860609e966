"""What a run shows and writes while it goes: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

import io
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitune import files, secrets
from minitune.errors import UserError

SHOWN = {  # in the bar and in lines: metric -> how
    "loss": "loss {:.4g}",
    "eval_loss": "eval loss {:.4g}",
    "learning_rate": "rate {:.3g}",
    "grad_norm": "norm {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gb": "{:.3g} GB",
    "skipped": "{}",
}
LONGEST = 2**16  # bytes of a line of metrics.jsonl that is kept
IN_THE_BAR = ("loss", "eval_loss", "tokens_per_second", "memory_gb", "skipped")


class RunLog:
    """The log of one run folder. A context manager; use `say` for lines so that they do not tear the bar."""

    def __init__(self, run: Path, steps: int, done: int, tensorboard: bool) -> None:
        """`done` steps of `steps` are behind us; what an earlier try logged past them is dropped."""
        self.path = run / "metrics.jsonl"
        keep_metrics(self.path, done)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)
        self.clock = Clock(steps, done)
        self.shown: dict[str, str] = {}
        self.bar = tqdm(
            total=steps,
            initial=done,
            unit="step",
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}{postfix}  ({elapsed} so far)",
        )
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)
        self.hook, threading.excepthook = threading.excepthook, self.quiet

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()
        finally:
            threading.excepthook = self.hook

    def quiet(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread would print a traceback when the disk is full; the next point raises the same error."""
        if not isinstance(failed.exc_value, OSError):
            self.hook(failed)

    def tick(self) -> None:
        self.clock.tick()
        self.bar.update()

    def metrics(self, step: int, **values: float | str) -> None:
        """One line of metrics.jsonl, one point of each TensorBoard curve. NaN and infinities become null."""
        whole = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps(secrets.hidden_in({"step": step, **whole})) + "\n")
        self.file.flush()
        if self.board:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)
        shown = {name: form.format(values[name]) for name, form in SHOWN.items() if name in values}
        left = f"{said(self.clock.left())} left" if self.clock.left() is not None else ""
        if self.bar.disable:
            say("  ".join(filter(None, [f"step {step}/{self.bar.total}", *shown.values(), left])))
        else:
            self.shown |= {name: text for name, text in shown.items() if name in IN_THE_BAR}
            self.bar.set_postfix_str("  ".join(filter(None, [*self.shown.values(), left])))


class NoLog:
    """What the other processes of a run log: nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def tick(self) -> None: ...

    def metrics(self, step: int, **values: float | str) -> None: ...


def say(line: str) -> None:
    """A line for the person watching, above any progress bar."""
    tqdm.write(secrets.hidden(line), file=sys.stdout)
    sys.stdout.flush()


def keep_metrics(path: Path, done: int) -> None:
    """Drop the lines of metrics.jsonl past step `done`, and a last line that was torn when the run was killed."""
    if not path.exists() and not path.is_symlink():
        return
    if not files.is_plain(path):
        raise UserError(f"{path} is in the way: it is no plain file; move it elsewhere")
    with files.replacing(path) as kept:
        out = io.BufferedWriter(kept)
        for line in whole_lines(path):
            try:
                if json.loads(line)["step"] <= done:
                    out.write(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        out.flush()
        out.detach()


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without those that are longer than a run's can be."""
    with open(path, "rb") as file:
        inside = False  # of a longer one
        while line := file.readline(LONGEST):
            ends = line.endswith(b"\n") or len(line) < LONGEST
            if ends and not inside:
                yield line.removesuffix(b"\n")
            inside = not ends


def count(number: float) -> str:
    """1234 -> "1,234", 8030261248 -> "8.03B": a number as a person says it."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def said(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Clock:
    """How long a run has still to go, by the pace of its last steps, evaluations and all."""

    RECENT = 200  # steps

    def __init__(self, steps: int, done: int) -> None:
        self.to_do = steps - done
        self.times = deque([time.perf_counter()], maxlen=self.RECENT + 1)

    def tick(self) -> None:
        """A step is done."""
        self.to_do -= 1
        self.times.append(time.perf_counter())

    def left(self) -> float | None:
        """Seconds; None before the first step is done."""
        if len(self.times) == 1:
            return None
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) * self.to_do


class Speed:
    """Tokens per second since the last reading."""

    def __init__(self) -> None:
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    def read(self) -> float:
        now = time.perf_counter()
        speed = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        return speed


def versions() -> dict[str, Any]:
    """What a result depends on: this program, Python, and the libraries that compute."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("minitune", "torch", "bitsandbytes", "tokenizers", "sentencepiece", "safetensors", "flash-attn-4"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
