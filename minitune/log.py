"""What a run shows and writes while it goes: a progress bar, metrics.jsonl, TensorBoard."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitune import files, secrets


class RunLog:
    """The log of one run folder. A context manager; use `say` for lines so that they do not tear the bar."""

    def __init__(self, run: Path, steps: int, done: int, tensorboard: bool) -> None:
        """`done` steps of `steps` are behind us; what an earlier try logged past them is dropped."""
        self.path = run / "metrics.jsonl"
        keep_metrics(self.path, done)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not sys.stdout.isatty(), dynamic_ncols=True)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()

    def tick(self) -> None:
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
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
        if self.bar.disable:
            say(f"step {step}/{self.bar.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
        else:
            self.bar.set_postfix_str(" ".join(f"{k} {v}" for k, v in shown.items()))


def say(line: str) -> None:
    """A line for the person watching, above any progress bar."""
    tqdm.write(secrets.hidden(line), file=sys.stdout)
    sys.stdout.flush()


def keep_metrics(path: Path, done: int) -> None:
    """Drop the lines of metrics.jsonl past step `done`, and a last line that was torn when the run was killed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    files.write_text(path, "".join(kept))


def count(number: float) -> str:
    """1234 -> "1,234", 8030261248 -> "8.03B": a number as a person says it."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


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
