"""Runs under real launchers: torchrun on one machine and on two, and a local Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from conftest import Launch, curve, made

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    root = HERE.parents[1]
    found = ":".join(map(str, (root, root / "scripts", HERE)))  # also in the processes that it starts
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": found}
    with open(log, "wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


def end(process: subprocess.Popen[bytes], log: Path, limit: float) -> tuple[int, str]:
    try:
        return process.wait(limit), log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def same(run: Path, other: Path) -> bool:
    weights = made(other)
    return curve(run) == curve(other) and all(torch.equal(weights[name], w) for name, w in made(run).items())


@pytest.fixture
def arguments(recipe: Path) -> list[str]:
    return [str(recipe), "train.gradient_accumulation_steps=2", "eval.samples=2", "eval.sample_tokens=4"]


@pytest.fixture
def whole(launch: Launch, arguments: list[str], tmp_path: Path) -> Path:
    """A run of two ranks that nothing befell."""
    assert launch(2, jobs.train, [*arguments, f"out={tmp_path / 'whole'}"]).codes == [0, 0]
    return tmp_path / "whole"


@pytest.mark.parametrize("what", ["raises", pytest.param("is killed", marks=pytest.mark.slow)])
def test_torchrun_starts_ranks_again_and_they_go_on_bit_for_bit(
    what: str, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    """Nothing of the first try is taken for the second's, such as why it failed."""
    trouble = json.dumps({"rank": 1, "step": 3, "what": what})
    command = [*TORCHRUN, "--standalone", "--max-restarts", "1", str(HERE / "under.py"), "torchrun", trouble]
    log = tmp_path / "log"
    code, said = end(start([*command, *arguments, f"out={tmp_path / 'run'}"], log), log, 200)
    assert code == 0, said
    assert "local_rank: 1" in said and said.count("going on from") == 1
    assert "going on from step-000002" in said
    assert same(tmp_path / "run", whole)


@pytest.mark.slow
def test_two_machines(arguments: list[str], launch: Launch, tmp_path: Path) -> None:
    """Two agents on the loopback, two ranks each, every machine with all of the model between its ranks."""
    arguments = [*arguments, "train.gradient_accumulation_steps=1", "parallel.sharding=hybrid"]
    assert launch(4, jobs.train, [*arguments, f"out={tmp_path / 'forked'}"], machines=2).codes == [0] * 4
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*TORCHRUN, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", where]
    command += ["scripts/train.py", *arguments, f"out={tmp_path / 'run'}"]
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    agents = [start(command, log) for log in logs]
    ended = [end(agent, log, 250) for agent, log in zip(agents, logs, strict=True)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert same(tmp_path / "run", tmp_path / "forked")


@pytest.mark.slow
def test_ray_goes_on_when_a_worker_is_killed(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    trouble = {"rank": 1, "step": 3, "what": "is killed", "mark": str(tmp_path / "tried")}
    command: list[Any] = [sys.executable, str(HERE / "under.py"), "ray", json.dumps(trouble), *arguments]
    log = tmp_path / "log"
    code, said = end(start([*command, f"out={tmp_path / 'run'}", "--num-workers", "2"], log), log, 280)
    assert code == 0, said
    assert (tmp_path / "tried").exists() and "going on from step-000002" in said, said
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "--num-workers N"),
        (["--num-workers"], "must be a whole number above 0, but is ''"),
        (["--num-workers", "0"], "must be a whole number above 0, but is '0'"),
        (["--num-workers", "2", "optim.learningrate=1"], "learning_rate"),
    ],
)
def test_what_ray_train_is_not_told(given: list[str], says: str) -> None:
    script = HERE.parents[1] / "scripts" / "ray_train.py"
    ended = subprocess.run([sys.executable, script, *given], check=False, capture_output=True, text=True)
    assert ended.returncode == 2 and says in ended.stderr and "Traceback" not in ended.stderr
