"""A run that stops and goes on is the run that never stopped, bit for bit."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Start, metrics
from safetensors.torch import load_file

from minitune import build, checkpoint, files, parallel, peft_format, runs, train
from minitune import step as steps
from minitune.errors import Interrupted, RunFailed, UserError
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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
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


def test_a_hangup_that_nohup_ignores_is_ignored(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunLog.tick

    def tick(self: RunLog) -> None:
        real(self)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(RunLog, "tick", tick)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert start("run", "train.max_steps=2")[1]["finished"]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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


def test_a_run_whose_recipe_holds_a_secret_goes_on(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable may be named like a secret and hold a value of the recipe; it is compared as it was written."""
    monkeypatch.setenv("DB_PASSWORD", ".*[qv]_proj")
    chosen = "lora.target_modules=.*[qv]_proj"
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            start("run", chosen)
    _, facts = start("run", chosen)
    assert facts["finished"] and facts["identity"]["lora.target_modules"] == "[hidden]"
    _, again = start("run", chosen)
    assert again["finished"] and again["seconds"] == facts["seconds"]


# ---- exactness -----------------------------------------------------------------------------------------------------

EVERYTHING = ("train.deterministic=true", "train.gradient_checkpointing=full", "optim.name=paged_adamw_8bit")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Runs ask PyTorch for it; the tests that follow have not."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("qlora", EVERYTHING),
        ("full", (*EVERYTHING, "model.dtype=bfloat16")),
        ("full", ("model.dtype=bfloat16", "optim.name=paged_adamw_32bit")),
        ("lora", ("model.dtype=bfloat16", "data.packing=false", "train.max_steps=8")),
    ],
)
def test_uninterrupted_is_resumed_and_is_no_cold_start(
    start: Start, monkeypatch: pytest.MonkeyPatch, deterministic: None, method: str, more: tuple[str, ...]
) -> None:
    """Three ways: straight, killed and resumed, and a start from the checkpoint's weights alone."""
    common = (f"method={method}", *more)
    straight, _ = start("straight", *common)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            start("resumed", *common)
    cold = straight.with_name("cold")
    shutil.copytree(straight.with_name("resumed"), cold)
    resumed, _ = start("resumed", *common)
    with monkeypatch.context() as patch:
        patch.setattr("minitune.optim.load_state", lambda *args: None)
        start("cold", *common)
    assert losses(resumed) == losses(straight) != losses(cold)
    last = checkpoint.name_of(max(losses(straight)))
    for name in ("trained.safetensors", "optimizer.safetensors"):
        digests = [files.sha256(run / "checkpoints" / last / name) for run in (resumed, straight, cold)]
        assert digests[0] == digests[1] != digests[2], name


@pytest.mark.slow
def test_compiled_blocks_go_on_bit_for_bit(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a run does not compile by itself, but it can."""
    real = build.compose

    def compiled(*arguments: object) -> object:
        model, line = real(*arguments)
        parallel.compile_blocks(model)
        return model, line

    monkeypatch.setattr(build, "compose", compiled)
    monkeypatch.setattr(parallel.CompiledForward, "failed", False)
    straight, _ = start("straight", "method=qlora")
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            start("resumed", "method=qlora")
    resumed, _ = start("resumed", "method=qlora")
    assert not parallel.CompiledForward.failed
    assert losses(resumed) == losses(straight) and weights(resumed) == weights(straight)


def test_no_observer_changes_the_weights(start: Start) -> None:
    plain, _ = start("plain", "eval.every_steps=0", "save.every_steps=0", "log.every_steps=100")
    for name, observed in {
        "looked at": ("eval.every_steps=1",),
        "saved": ("save.every_steps=1", "save.keep_last=1"),
        "logged": ("log.every_steps=7", "log.tensorboard=true"),
        "all": ("eval.every_steps=2", "save.every_steps=3", "log.every_steps=1", "eval.samples=3"),
    }.items():
        other, _ = start(name, *observed)
        last = f"checkpoints/{checkpoint.name_of(max(losses(other)))}/trained.safetensors"
        ours = weights(plain)
        theirs = {f"base_model.model.{k}.weight": v.numpy().tobytes() for k, v in load_file(other / last).items()}
        assert ours == theirs, name


# ---- signals -------------------------------------------------------------------------------------------------------


def send(where: str, signum: int = signal.SIGTERM) -> Callable[..., None]:
    """A function that signals this process in the place of `where`, and then does what is done there."""
    owner, name = {
        "preparing": (train, "prepare"),
        "building": (build, "fill"),
        "step": (train, "take_step"),
        "evaluation": (steps, "eval_batches"),
        "save": (checkpoint, "write"),
        "verifying": (checkpoint, "damaged"),
        "export": (peft_format, "save"),
    }[where]

    def plant(patch: pytest.MonkeyPatch, nth: int = 1) -> None:
        real, calls = getattr(owner, name), []

        def call(*arguments: object, **options: object) -> object:
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), signum)
                time.sleep(0.05)  # a thread's signal is the main thread's to handle
            return real(*arguments, **options)

        patch.setattr(owner, name, call)

    return plant


@pytest.mark.parametrize(
    ("where", "nth", "saved"),
    [
        ("preparing", 1, None),
        ("building", 1, None),
        ("step", 1, 1),
        ("step", 4, 4),
        ("evaluation", 1, 3),
        ("evaluation", 2, 6),
        ("save", 1, None),
        ("verifying", 2, None),
        ("export", 1, None),
    ],
)
def test_wherever_the_signal_comes_the_run_ends_in_order_and_goes_on_exactly(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, nth: int, saved: int | None
) -> None:
    straight, facts = start("straight")
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send(where)(patch, nth)
        with pytest.raises(Interrupted) as stopped:
            start("stopped")
    run = tmp_path / "stopped"
    assert stopped.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == handler
    assert not (run / "run.lock").exists()
    if saved:
        assert checkpoint.checkpoints(run)[-1].name == checkpoint.name_of(saved) and f"step {saved}," in str(
            stopped.value
        )
        assert str(stopped.value) in json.loads((run / "run.json").read_text())["finish_reason"]
    _, again = start("stopped")
    assert lines(run) == lines(straight) and weights(run) == weights(straight)
    assert again["finished"] and again["best_step"] == facts["best_step"]
    assert not list(run.rglob(".*"))


def lines(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what the clock says."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gb")} for line in metrics(run)]


def test_a_signal_during_the_last_save_waits_for_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last checkpoint is being written, slowly, when SIGTERM comes: it is there when the run has ended."""
    real = checkpoint.write

    def slow(run: Path, snapshot: checkpoint.Snapshot) -> Path:
        if snapshot.step == 5:
            time.sleep(0.5)  # the loop is over, and waits for this
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return real(run, snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", slow)
        with pytest.raises(Interrupted):
            start("run", "train.max_steps=5")
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == "step-000005"
    assert checkpoint.damaged(tmp_path / "run" / "checkpoints" / "step-000005") is None
    assert not (tmp_path / "run" / "adapter").exists()
    _, facts = start("run", "train.max_steps=5")
    assert facts["finished"] and (tmp_path / "run" / "adapter").exists()


def test_a_signal_does_not_hide_that_its_save_failed(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(run: Path, snapshot: checkpoint.Snapshot) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        send("step")(patch, 3)
        patch.setattr(checkpoint, "write", full)
        with pytest.raises(RunFailed, match="checkpoint 3 could not be written"):
            start("run", "save.every_steps=100", "eval.every_steps=0")
    assert "could not be written" in json.loads((tmp_path / "run" / "run.json").read_text())["finish_reason"]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_and_harms_nothing(start: Start, tmp_path: Path, second: int) -> None:
    """The writer is stuck in a save of an hour; a third of the run is on the disk."""
    straight, _ = start("straight")
    code = """
import sys, time
from minitune import checkpoint, errors
from minitune.config import load_config
real = checkpoint.write
def slow(run, snapshot):
    if snapshot.step == 4:
        print("stuck", flush=True)
        time.sleep(3600)
    return real(run, snapshot)
checkpoint.write = slow
def main(arguments):
    from minitune.train import train
    train(load_config(arguments))
errors.run(main)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.toml"), f"out={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "stuck\n":
            break
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    asked = time.time()
    process.send_signal(second)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -second and time.time() - asked < 2  # which a shell calls 143 or 130
    assert "Traceback" not in errors
    run, facts = start("run")
    assert facts["finished"] and lines(run) == lines(straight) and weights(run) == weights(straight)


def test_kept_from_a_folder_that_a_run_is_in(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = start("run", "train.max_steps=1")
    code = "import sys, time; from pathlib import Path; from minitune import lock\n"
    code += f"with lock.hold(Path({str(run)!r})): print('held', flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        for more in ((), ("train.resume=never",)):
            with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
                start("run", "train.max_steps=2", *more) if more else resumed_anew(start, run)
        assert run.is_dir() and not run.with_name("run.1").exists()
    finally:
        holder.kill()
        holder.wait()


def resumed_anew(start: Start, run: Path) -> None:
    """Start a run again that is not finished any more."""
    (run / "adapter" / "adapter_model.safetensors").unlink()
    start("run", "train.max_steps=1")


# ---- what is called finished ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["emptied", "gone", "turned", "identity is a list", "made is empty", "facts are gone"])
def test_a_finished_run_that_lacks_what_it_made_makes_it_again(
    start: Start, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    run, facts = start("run")
    made = weights(run)
    adapter, told = run / "adapter" / "adapter_model.safetensors", json.loads((run / "run.json").read_text())
    match harm:
        case "emptied":
            for file in adapter.parent.iterdir():
                file.unlink()
        case "gone":
            shutil.rmtree(adapter.parent)
        case "turned":
            adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x55")
        case "identity is a list":
            told["identity"] = [1]
        case "made is empty":
            told["made"] = {}
        case "facts are gone":
            del told["finish_reason"], told["step"]
    (run / "run.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="has not finished"):
        runs.open_run(run)
    capsys.readouterr()
    _, again = start("run")
    assert "taking it as not finished" in capsys.readouterr().out
    assert weights(run) == made and again["made"] == facts["made"] and again["step"] == facts["step"]


def test_splitting_a_step_otherwise_is_refused_where_dropout_depends_on_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ("train.batch_size=3", "train.gradient_accumulation_steps=2")
    start("dropped", "train.max_steps=2")
    with pytest.raises(UserError, match=r"train\.batch_size: 2 then, 3 now(.|\n)*dropout"):
        start("dropped", "train.max_steps=2", *other)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            start("not dropped", "lora.dropout=0.0")
    run, facts = start("not dropped", "lora.dropout=0.0", *other)
    straight, _ = start("straight", "lora.dropout=0.0")
    assert facts["finished"]
    series = [torch.tensor(list(losses(each).values())) for each in (run, straight)]
    torch.testing.assert_close(*series, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"rows of a step .*: 6 then, 9 now"):
        start("not dropped", "lora.dropout=0.0", "train.batch_size=3")


def test_litter_of_a_killed_run_is_swept(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            start("run")
    run = tmp_path / "run"
    (run / ".run.json.1.part").write_text("{")
    (run / ".adapter.part").mkdir()
    (run / "checkpoints" / ".step-000004.part").mkdir()
    start("run")
    assert not list(run.rglob(".*"))
