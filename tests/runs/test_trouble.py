"""What may go wrong under way: the run ends with exit 1 and one sentence, and its checkpoints are whole."""

import errno
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from conftest import Start, metrics
from safetensors.torch import load_file

from minitune import checkpoint, log, train
from minitune.config import Config, LoRAConfig, TrainConfig
from minitune.errors import RunFailed
from minitune.log import Clock, RunLog, said
from minitune.trouble import out_of_memory

ROOT = Path(__file__).parents[2]


def weights(run: Path) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in load_file(run / "adapter" / "adapter_model.safetensors").items()}


def all_whole(run: Path) -> list[int]:
    """The steps of the run's checkpoints, each of them verified."""
    found = checkpoint.checkpoints(run)
    assert all(checkpoint.damaged(path) is None for path in found)
    return [checkpoint.step_of(path) for path in found]


def goes_on_to(start: Start, straight: Path, name: str, *more: str) -> None:
    run, facts = start(name, *more)
    assert facts["finished"] and weights(run) == weights(straight)
    assert [line["loss"] for line in metrics(run) if "loss" in line] == [
        line["loss"] for line in metrics(straight) if "loss" in line
    ]


# ---- the disk ------------------------------------------------------------------------------------------------------


def no_room_for(patch: pytest.MonkeyPatch, name: str, nth: int = 1) -> None:
    """The n-th file or folder of that name that is to appear does not, since the disk is full."""
    real, seen = os.replace, []

    def rename(source: Path, target: Path) -> None:
        if Path(target).name == name:
            seen.append(1)
            if len(seen) >= nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    patch.setattr(os, "replace", rename)


@pytest.mark.parametrize(
    ("name", "nth", "saved"),
    [
        ("trained.safetensors", 3, [2, 3, 4]),  # 3 was the best so far
        ("manifest.json", 3, None),
        ("step-000004", 1, None),
        ("config.toml", 1, []),
        ("run.json", 1, []),
        ("run.json", 2, None),  # the last
        ("adapter_model.safetensors", 1, None),
        ("adapter", 1, None),
    ],
)
def test_a_full_disk_ends_the_run_and_leaves_its_checkpoints(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, nth: int, saved: list[int] | None
) -> None:
    straight, _ = start("straight")
    with monkeypatch.context() as patch:
        no_room_for(patch, name, nth)
        with pytest.raises(RunFailed, match=r"No space left on device.*Make room") as failed:
            start("run")
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 400
    run = tmp_path / "run"
    steps = all_whole(run)
    assert saved is None or steps == [step for step in saved if step <= max(steps, default=0)]
    assert not (run / "run.lock").exists() and not list((run / "checkpoints").glob(".*"))
    goes_on_to(start, straight, "run")


def test_a_failed_save_ends_the_run_before_the_next_is_due(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = train.take_step

    def slower(*arguments):
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(train, "take_step", slower)
    no_room_for(monkeypatch, "step-000003")
    with pytest.raises(RunFailed, match="checkpoint 3 could not be written"):
        start("run", "save.every_steps=3", "eval.every_steps=0", "train.max_steps=30")
    assert metrics(tmp_path / "run")[-1]["step"] < 6


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (0, 1, 20, 200)]


@pytest.mark.parametrize("kilobytes", [4, 60, *SLOW])
def test_a_limit_on_the_size_of_files(start: Start, tmp_path: Path, kilobytes: int) -> None:
    """The system's own error, through a real process: exit 1, one sentence, no traceback, no half of a file."""
    straight, _ = start("straight", "log.tensorboard=true")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))

    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(tmp_path / "recipe.toml")]
    command += [f"out={tmp_path / 'run'}", "log.tensorboard=true"]
    ended = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False)
    run = tmp_path / "run"
    if ended.returncode == 0:
        assert kilobytes == 200
        return
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr and len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "File too large" in ended.stderr and "Make room" in ended.stderr
    all_whole(run)
    assert not list(run.rglob("*.part"))
    goes_on_to(start, straight, "run", "log.tensorboard=true")


def test_a_full_disk_under_metrics(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    straight, _ = start("straight")

    def full(self: RunLog, step: int, **values: object) -> None:
        if step == 5:
            os.close(self.file.fileno())
            os.open("/dev/full", os.O_WRONLY)  # takes the number that was set free
        real(self, step, **values)

    real = RunLog.metrics
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "metrics", full)
        with pytest.raises(RunFailed, match="No space left on device"):
            start("run")
    assert all_whole(tmp_path / "run") == [2, 3, 4]
    goes_on_to(start, straight, "run")


def test_a_full_disk_under_tensorboard(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its thread has the error; it reaches the run at one of the next points, and no traceback the terminal."""
    straight, _ = start("straight", "log.tensorboard=true")
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)

    def full(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = RunLog.metrics

    def metrics(self: RunLog, step: int, **values: object) -> None:
        if step == 5:
            patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        real(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "metrics", metrics)
        with pytest.raises(RunFailed, match="No space left on device"):
            start("run", "log.tensorboard=true")
    assert not tracebacks and threading.excepthook == tracebacks.append
    assert all_whole(tmp_path / "run")
    goes_on_to(start, straight, "run", "log.tensorboard=true")


# ---- numbers, memory, workers --------------------------------------------------------------------------------------


def test_skipped_steps_are_counted_and_the_run_goes_on_exactly(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is NaN at two steps, the run killed after them: the count and the optimizer's agree on resuming."""
    real = train.take_step

    def poisoned(model, optimizer, micro_batches, cfg, step):
        if step in (1, 3):
            hook = model.register_forward_hook(lambda module, inputs, output: output * float("nan"))
            try:
                return real(model, optimizer, micro_batches, cfg, step)
            finally:
                hook.remove()
        return real(model, optimizer, micro_batches, cfg, step)

    monkeypatch.setattr(train, "take_step", poisoned)
    straight, facts = start("straight")
    assert facts["skipped_steps"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "tick", stop_after(6))
        with pytest.raises(KeyboardInterrupt):
            start("run")
    run, again = start("run")
    assert again["skipped_steps"] == 2 and weights(run) == weights(straight)
    assert [line["step"] for line in metrics(run) if "skipped" in line] == [2, 4]


def stop_after(steps: int) -> Callable[[RunLog], None]:
    real, seen = RunLog.tick, itertools.count(1)

    def tick(self: RunLog) -> None:
        real(self)
        if next(seen) == steps:
            raise KeyboardInterrupt

    return tick


def test_three_bad_steps_leave_the_checkpoints_from_before(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also across a restart: the count of bad steps in a row is kept."""
    real = train.take_step

    def poisoned(model, optimizer, micro_batches, cfg, step):
        hook = model.register_forward_hook(lambda module, inputs, output: output * float("inf" if step > 3 else 1))
        try:
            return real(model, optimizer, micro_batches, cfg, step)
        finally:
            hook.remove()

    monkeypatch.setattr(train, "take_step", poisoned)
    for _ in range(2):
        with pytest.raises(RunFailed, match="3 steps in a row, up to step 7"):
            start("run", "eval.every_steps=0")
    assert all_whole(tmp_path / "run") == [2, 4, 6]
    four, six = (load_file(path / "trained.safetensors") for path in checkpoint.checkpoints(tmp_path / "run")[1:])
    assert all(torch.equal(four[name], six[name]) for name in four)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_out_of_memory_says_which_knob_to_turn(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    straight, _ = start("straight")
    real = train.take_step

    def short(model, optimizer, micro_batches, cfg, step):
        if step == 5:
            raise error
        return real(model, optimizer, micro_batches, cfg, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", short)
        with pytest.raises(RunFailed, match=r"out of memory.*train\.gradient_checkpointing=full") as failed:
            start("run")
    assert "\n" not in str(failed.value)
    assert all_whole(tmp_path / "run") == [2, 3, 4]
    goes_on_to(start, straight, "run", "train.gradient_checkpointing=full")


def test_the_knobs_to_turn_are_those_that_are_left_and_do_what_is_said() -> None:
    dropping = out_of_memory(Config(), "CUDA")
    assert "go on with train.gradient_checkpointing=full, train.offload=inputs, model.dense_weights=never; " in dropping
    assert "anew with train.batch_size=1 train.gradient_accumulation_steps=16, optim.name=paged_adamw_8bit" in dropping
    least = TrainConfig(batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing="full", offload="inputs")
    plain = out_of_memory(Config(method="lora", train=least, lora=LoRAConfig(dropout=0.0)), "CUDA")
    assert "go on with train.batch_size=1 train.gradient_accumulation_steps=8; or start anew with optim.name" in plain
    assert "method=qlora" in plain


def test_other_mistakes_keep_their_traceback(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(train, "take_step", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        start("run")


def test_a_worker_that_dies_is_told_in_a_sentence(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*arguments: object) -> None:
        with ProcessPoolExecutor(1) as pool:
            pool.submit(os._exit, 9).result()

    with pytest.raises(BrokenProcessPool):
        dying()
    monkeypatch.setattr(train, "prepare", dying)
    with pytest.raises(RunFailed, match="a worker process that reads data died"):
        start("run")


# ---- what is shown, what is remembered -------------------------------------------------------------------------------


def test_plain_lines_tell_loss_speed_memory_and_time_left(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    _, facts = start("run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    steps = [line for line in lines if "tokens/s" in line]
    assert len(steps) == facts["steps"]
    for line in steps:
        assert all(word in line for word in (" loss ", " rate ", " norm ", " tokens/s", " GB", " left")), line
    assert lines[-1].endswith("0:00 left")
    assert any("eval loss" in line for line in lines)


def test_the_bar_is_there_on_a_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with RunLog(tmp_path, 10, 4, tensorboard=False) as shown:
        for step in (5, 6):
            shown.tick()
            shown.metrics(step, loss=1.25, tokens_per_second=1234.5, memory_gb=2.5)
        shown.metrics(6, eval_loss=1.5)
        shown.bar.refresh()
    out = capsys.readouterr().out
    for part in ("6/10", "loss 1.25", "eval loss 1.5", "1,234 tokens/s", "2.5 GB", " left"):
        assert part in out, part
    assert "step 5/10" not in out


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    clock = Clock(10, 4)
    assert clock.left() is None
    for _ in range(2):
        now[0] += 3.0
        clock.tick()
    assert clock.left() == pytest.approx(12.0)
    assert [said(x) for x in (0, 59.6, 75, 4000, 100_000)] == ["0:00", "1:00", "1:15", "1:06:40", "27:46:40"]


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_metrics_that_are_no_plain_file_are_in_the_way(start: Start, tmp_path: Path, kind: str) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    (run / "run.json").write_text('{"identity": {}}')  # of a run that was cut
    precious.write_text("keep me")
    (run / "metrics.jsonl").symlink_to(precious) if kind == "link" else os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(Exception, match=r"metrics\.jsonl is in the way"):
        start("run")
    assert precious.read_text() == "keep me"


def test_metrics_of_any_size_are_read_line_by_line(tmp_path: Path) -> None:
    """A sparse file has any size for nothing, and one line."""
    path = tmp_path / "metrics.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"step": 1, "loss": 2.5}\nno JSON\n')
        file.seek(200_000_000)
        file.write(b'\n{"step": 2}\n{"step": 3}\n{"step": 2, "eval_loss": 1.0}')
    tracemalloc.start()
    log.keep_metrics(path, 2)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2}\n{"step": 2, "eval_loss": 1.0}\n'


def test_a_manifest_of_millions_of_values_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"a": [' + "[]," * 4_000_000 + "[]]}")
    tracemalloc.start()
    assert checkpoint.damaged(tmp_path) is not None
    assert tracemalloc.get_traced_memory()[1] < 100_000_000  # parsed, four times as much
    tracemalloc.stop()


@pytest.mark.slow
def test_the_script_for_the_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    """tests/gpu/survive.py, in small."""
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "survive.py"), str(tmp_path / "survive")]
    command += ["--tiny", "--kills", "2", "--steps", "20", "--long", "150"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert all(row["survived"] == row["injected"] > 0 for row in told["rows"]) and len(told["rows"]) == 6
