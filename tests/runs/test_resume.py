"""A run that stops and goes on is the run that never stopped, bit for bit."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Start, metrics
from safetensors.torch import load_file

from minitune import checkpoint, files
from minitune.errors import Interrupted, UserError
from minitune.log import RunLog

ROOT = Path(__file__).parents[2]


def weights(run: Path) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in load_file(run / "adapter" / "adapter_model.safetensors").items()}


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


class Killed(BaseException):
    """Stands for kill -9: nothing of the run's own code handles it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Die in the middle of step `step` + 1, after its first micro-batch."""
    real, seen = RunLog.tick, []

    def tick(self: RunLog) -> None:
        seen.append(1)
        if len(seen) > step:
            raise Killed
        real(self)

    monkeypatch.setattr(RunLog, "tick", tick)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_killed_runs_go_on_bit_for_bit(start: Start, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Dropout on, three epochs, checkpoints every two steps, killed between them, twice, the second time in epoch 2."""
    straight, _ = start("straight", f"method={method}")
    for step in (3, 4):  # the second try begins at step 2 and is killed at 6
        with monkeypatch.context() as patch:
            kill_after(patch, step)
            with pytest.raises(Killed):
                start("killed", f"method={method}")
    killed, _ = start("killed", f"method={method}")
    assert losses(killed) == losses(straight)
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert files.sha256(killed / name) == files.sha256(straight / name)
    evals = [[line for line in metrics(run) if "eval_loss" in line] for run in (killed, straight)]
    assert evals[0] == evals[1] and len(evals[0]) > 2


def test_the_comparison_can_fail(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume that forgets the moments differs at once."""
    straight, _ = start("straight")
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            start("forgetful")
    with monkeypatch.context() as patch:
        patch.setattr("minitune.optim.load_state", lambda *args: None)
        forgetful, _ = start("forgetful")
    assert losses(forgetful) != losses(straight)


def test_mid_window_numbers_do_not_depend_on_observers(start: Start) -> None:
    """Evaluating, logging and saving more or less often changes no loss and no weight."""
    plain, _ = start("plain", "eval.every_steps=0", "data.eval_fraction=0.1")
    busy, _ = start("busy", "eval.every_steps=1", "save.every_steps=1", "log.every_steps=1", "eval.samples=3")
    assert losses(plain) == losses(busy)
    last = checkpoint.checkpoints(plain)[-1].name
    assert last == checkpoint.checkpoints(busy)[-1].name
    digests = [files.sha256(run / "checkpoints" / last / "trained.safetensors") for run in (plain, busy)]
    assert digests[0] == digests[1]


def test_a_finished_run_restarted_changes_nothing(start: Start) -> None:
    run, facts = start("once")
    before = {path: (path.stat().st_mtime_ns, files.sha256(path)) for path in run.rglob("*") if path.is_file()}
    again, facts_again = start("once")
    after = {path: (path.stat().st_mtime_ns, files.sha256(path)) for path in again.rglob("*") if path.is_file()}
    assert before == after
    assert json.loads(json.dumps(facts)) == facts_again


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.learning_rate=1e-3", "optim.learning_rate"),
        ("lora.r=8", "lora.r"),
        ("seed=4", "seed"),
        ("data.max_seq_len=96", "data.max_seq_len"),
        ("train.num_epochs=4", "train.num_epochs"),
    ],
)
def test_a_changed_recipe_is_refused_by_name(start: Start, override: str, named: str) -> None:
    start("run")
    with pytest.raises(UserError, match=named):
        start("run", override)


def test_changed_data_is_refused_and_harmless_keys_are_not(start: Start, rows_file: Path, tmp_path: Path) -> None:
    start("run", "train.max_steps=2")
    start("run", "train.max_steps=2", "log.every_steps=2", "save.keep_last=1")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows_file.read_bytes())
    start("run", "train.max_steps=2", f"data.train={moved}")
    moved.write_bytes(rows_file.read_bytes() + b'{"instruction": "more", "output": "rows"}\n')
    with pytest.raises(UserError, match="the data"):
        start("run", "train.max_steps=2", f"data.train={moved}")


def test_resume_never_keeps_the_old_run(start: Start) -> None:
    run, _ = start("run", "train.max_steps=2")
    old = weights(run)
    start("run", "train.max_steps=3", "train.resume=never")
    assert weights(run.with_name("run.1")) == old
    assert weights(run) != old


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    straight, _ = start("straight")
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            start("harmed")
    run = straight.with_name("harmed")
    newest = checkpoint.checkpoints(run)[-1]
    victim = newest / ("manifest.json" if harm == "manifest" else "trained.safetensors")
    data = bytearray(victim.read_bytes())
    if harm == "delete":
        victim.unlink()
    elif harm == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[-7] ^= 16
        victim.write_bytes(data)
    start("harmed")
    assert f"{newest.name} is damaged" in capsys.readouterr().out
    assert (run / "checkpoints" / f"{newest.name}.bad").exists()
    assert losses(run) == losses(straight)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(start: Start, tmp_path: Path, signum: int, code: int) -> None:
    longer = ("train.num_epochs=15", "log.every_steps=1", "eval.every_steps=0")
    straight, _ = start("straight", *longer)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(tmp_path / "recipe.toml")]
    command += [f"out={tmp_path / 'stopped'}", *longer]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    log = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and "\n" in log.read_text()) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    asked = time.time()
    os.kill(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("the run was over before the signal came; give it more steps")
    assert process.returncode == code, errors
    assert time.time() - asked < 10
    assert "Traceback" not in errors
    stopped, _ = start("stopped", *longer)
    assert losses(stopped) == losses(straight)


def test_interrupted_in_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunLog.tick

    def tick(self: RunLog) -> None:
        real(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "tick", tick)
        with pytest.raises(Interrupted) as stopped:
            start("run")
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_damaged_best_checkpoint_is_said_and_not_used(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third evaluation is the best; its checkpoint is cut while the run is stopped."""
    losses_told = itertools.chain([3.0, 2.0, 1.0], itertools.repeat(5.0))
    monkeypatch.setattr("minitune.train.evaluate", lambda *arguments: next(losses_told))
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            start("run", "eval.every_steps=1")
    run = tmp_path / "run"
    victim = run / "checkpoints" / "step-000003" / "trained.safetensors"
    victim.write_bytes(victim.read_bytes()[:-9])
    _, facts = start("run", "eval.every_steps=1")
    assert "step-000003, is damaged" in capsys.readouterr().out
    assert facts["best_step"] == 3 and facts["handed_over_step"] == facts["step"] == facts["steps"]
