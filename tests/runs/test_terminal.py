"""Nobody has to watch a run for it to end well."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Start, metrics

from minitune import terminal

ROOT = Path(__file__).parents[2]
FEW = ("train.max_steps=6", "eval.every_steps=0")


def read_a_line(command: list[str]) -> tuple[int, bytes]:
    """As `| head -1` does."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        return process.wait(120), process.stderr.read()


def read_nothing(command: list[str]) -> tuple[int, bytes]:
    """Both streams are broken from the start."""
    out, into = os.pipe()
    os.close(out)
    code = subprocess.run(command, stdout=into, stderr=into, timeout=120, check=False).returncode
    os.close(into)
    return code, b"stdout (Broken pipe)"


def to_a_full_disk(command: list[str]) -> tuple[int, bytes]:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("watch", [read_a_line, read_nothing, to_a_full_disk])
def test_a_run_goes_on_when_nobody_can_read_it(
    start: Start, tmp_path: Path, watch: Callable[[list[str]], tuple[int, bytes]]
) -> None:
    straight, _ = start("straight", *FEW)
    script = str(ROOT / "scripts" / "train.py")
    code, errors = watch([sys.executable, script, str(tmp_path / "recipe.toml"), f"out={tmp_path / 'run'}", *FEW])
    run = tmp_path / "run"
    assert code == 0 and b"Traceback" not in errors and b"Exception ignored" not in errors, errors
    assert errors.count(b"stdout (") == 1 and len(errors.splitlines()) <= 1, errors
    assert json.loads((run / "run.json").read_text())["finished"]
    assert [line.get("loss") for line in metrics(run)] == [line.get("loss") for line in metrics(straight)]


def test_it_would_end(start: Start, tmp_path: Path) -> None:
    """The negative control: the same without what outlives a reader."""
    start("straight", *FEW)
    code = (
        "import contextlib, runpy, sys; from minitune import train; train.outlived = contextlib.nullcontext; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(ROOT / "scripts" / "train.py")
    arguments = [script, str(tmp_path / "recipe.toml"), f"out={tmp_path / 'run'}", *FEW]
    assert read_a_line([sys.executable, "-c", code, *arguments])[0] != 0


def test_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with terminal.outlived():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
