"""What the loop promises about its numbers and its folder."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Start, metrics
from safetensors.torch import load_file

from minitune import checkpoint, optim, train
from minitune.config import OptimConfig, load_config
from minitune.errors import RunFailed, UserError


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_k_micro_batches_are_one_batch(start: Start, method: str) -> None:
    """Rows hold unequal numbers of loss tokens; the last window of an epoch is partial."""
    common = [f"method={method}", "train.num_epochs=2", "data.eval_fraction=0"]
    common += [] if method == "full" else ["lora.dropout=0.0"]
    runs = [
        start(f"{size}x{times}", *common, f"train.batch_size={size}", f"train.gradient_accumulation_steps={times}")[0]
        for size, times in ((6, 1), (2, 3), (1, 6))
    ]
    series = [[(line["loss"], line["grad_norm"]) for line in metrics(run)] for run in runs]
    assert len(series[0]) > 3
    for other in series[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(series[0]), rtol=1e-5, atol=1e-6)
    if method != "full":
        adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
        for other in adapters[1:]:
            # AdamW divides by the root of tiny second moments: rounding of 1e-7 in a gradient may grow to 1e-4 here
            torch.testing.assert_close(other, adapters[0], rtol=1e-3, atol=1e-4)


def test_a_mean_of_means_would_be_caught(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: dividing each micro-batch by its own tokens changes the losses visibly."""

    def mean_of_means(model, optimizer, micro_batches, cfg, step):
        loss = torch.zeros(())
        for batch in micro_batches:
            total = model(batch.tokens, batch.positions, batch.documents, batch.labels, batch.learned)
            mean = total / max(1, batch.loss_tokens) / len(micro_batches)
            mean.backward()
            loss += mean.detach()
        norm, finite = optim.update(model, optimizer, cfg.optim.max_grad_norm, loss)
        optimizer.zero_grad(set_to_none=True)
        return loss, norm, finite

    common = ("lora.dropout=0.0", "data.eval_fraction=0", "train.batch_size=1", "train.gradient_accumulation_steps=6")
    right, _ = start("right", *common)
    monkeypatch.setattr(train, "take_step", mean_of_means)
    wrong, _ = start("wrong", *common)
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(metrics(right), metrics(wrong), strict=True))
    assert difference > 1e-3


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "ratio"), [(100, 0.03), (7, 0.3), (10, 0.0), (1, 0.5), (200, 0.1)])
def test_learning_rate_in_closed_form(scheduler: str, steps: int, ratio: float) -> None:
    cfg = OptimConfig(learning_rate=2.0, lr_scheduler=scheduler, warmup_ratio=ratio)
    rates = [optim.learning_rate(step, steps, cfg) for step in range(steps)]
    warmup = math.ceil(steps * ratio)
    assert rates[0] > 0 and max(rates) == pytest.approx(2.0)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(2.0)
        assert rates[0] == pytest.approx(2.0 / warmup)
    for step in range(warmup, steps):
        progress = (step - warmup) / (steps - warmup)
        expected = {"cosine": 1 + math.cos(math.pi * progress), "linear": 2 * (1 - progress), "constant": 2.0}
        assert rates[step] == pytest.approx(expected[scheduler])
    assert all(a >= b for a, b in itertools.pairwise(rates[max(warmup - 1, 0) :]))


def test_logged_rates_are_those_of_the_closed_form(start: Start) -> None:
    run, facts = start("run")
    cfg = load_config([str(run / "config.toml")])
    logged = [line["learning_rate"] for line in metrics(run) if "learning_rate" in line]
    assert logged == [optim.learning_rate(step, facts["steps"], cfg.optim) for step in range(facts["steps"])]


def test_every_update_moves_every_trained_parameter_and_nothing_else(start: Start, small_base: Path) -> None:
    run, _ = start("run", "train.max_steps=2", "save.every_steps=1", "save.keep_last=9", "data.eval_fraction=0")
    one, two = (load_file(run / "checkpoints" / f"step-00000{n}" / "trained.safetensors") for n in (1, 2))
    assert all("lora_" in name for name in one)
    assert all(not torch.equal(one[name], two[name]) for name in one)
    assert all(tensor.dtype == torch.float32 for tensor in one.values())


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: float) -> None:
    """Make the gradient of these steps (from 0) non-finite."""
    real = optim.update
    count = itertools.count()

    def update(model: torch.nn.Module, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        if next(count) in steps:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = what
        return real(model, *rest)

    monkeypatch.setattr(optim, "update", update)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_poisoned_step_is_not_applied(start: Start, monkeypatch: pytest.MonkeyPatch, what: float) -> None:
    poison(monkeypatch, {1}, what)
    run, _ = start("run", "train.max_steps=3", "save.every_steps=1", "save.keep_last=9", "data.eval_fraction=0")
    saved = [load_file(run / "checkpoints" / f"step-00000{n}" / "trained.safetensors") for n in (1, 2, 3)]
    moments = [load_file(run / "checkpoints" / f"step-00000{n}" / "optimizer.safetensors") for n in (1, 2)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert any(not torch.equal(saved[1][name], saved[2][name]) for name in saved[0])
    assert all(torch.isfinite(tensor).all() for tensor in saved[2].values())
    [line] = [line for line in metrics(run) if "skipped" in line]
    assert line["step"] == 2 and line["grad_norm"] is None


def test_three_poisoned_steps_end_the_run(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, {1, 2, 4, 5, 6}, float("nan"))  # two in a row go by, three do not
        with pytest.raises(RunFailed, match="3 steps in a row, up to step 7"):
            start("run")


def test_early_stopping_and_the_best_checkpoint(start: Start) -> None:
    """A rate far too high: the evaluation gets worse, the run stops, and the adapter is that of the best step."""
    run, facts = start(
        "run",
        "optim.learning_rate=0.5",
        "optim.max_grad_norm=0",
        "optim.lr_scheduler=constant",
        "train.num_epochs=20",
        "eval.every_steps=1",
        "eval.early_stopping_patience=2",
        "save.keep_last=1",
    )
    assert facts["finish_reason"] == "early stopping"
    evals = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    best = min(evals, key=evals.get)
    assert facts["best_step"] == best and facts["step"] == best + 2
    best_weights = load_file(run / "checkpoints" / f"step-{best:06d}" / "trained.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, tensor in best_weights.items():
        assert torch.equal(adapter[f"base_model.model.{name}.weight"], tensor)
    assert len(list((run / "checkpoints").iterdir())) <= 3


def test_rotation_keeps_the_last_and_the_best(start: Start) -> None:
    run, facts = start("run", "save.every_steps=1", "save.keep_last=2")
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    steps, best = facts["steps"], facts["best_step"]
    last = {f"step-{steps - 1:06d}", f"step-{steps:06d}"}
    bests = {checkpoint.read_state(run / "checkpoints" / name)["progress"]["best_step"] for name in last} | {best}
    assert kept == last | {f"step-{n:06d}" for n in bests}


@pytest.mark.parametrize(("held_out", "saved"), [("data.eval_fraction=0", [5]), ("data.eval_fraction=0.1", [3, 5])])
def test_saving_at_no_steps_saves_the_best_and_the_last(
    start: Start, monkeypatch: pytest.MonkeyPatch, held_out: str, saved: list[int]
) -> None:
    """The third step is evaluated as better than the last. What is handed over can then be made again."""
    told = itertools.chain([1.0], itertools.repeat(5.0))
    monkeypatch.setattr(train, "evaluate", lambda *arguments: next(told))
    run, _ = start("run", held_out, "train.max_steps=5", "save.every_steps=0")
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == saved
    assert all(checkpoint.damaged(path) is None for path in checkpoint.checkpoints(run))


def test_the_run_folder(start: Start) -> None:
    run, facts = start("run", "log.tensorboard=true")
    assert load_config([str(run / "config.toml")]).out == str(run)
    written = json.loads((run / "run.json").read_text())
    assert written == json.loads(json.dumps(facts))
    assert {"rows", "skipped", "duplicates", "train_documents", "packed_rows", "fill"} <= written["data"].keys()
    assert {"torch", "bitsandbytes", "python"} <= written["versions"].keys()
    first = metrics(run)[0]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gb"} <= first.keys()
    assert list((run / "tensorboard").iterdir())
    assert not [path for path in run.rglob("*") if path.name.endswith((".part", ".old", ".tmp"))]


def test_the_first_line_says_what_will_be_trained(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("run", "train.max_steps=1")
    first = capsys.readouterr().out.splitlines()[0]
    for part in ("lora of", "parameters train", "documents", "tokens", "steps of", "GB"):
        assert part in first


def test_rows_longer_than_the_model_are_refused(start: Start) -> None:
    with pytest.raises(UserError, match="max_seq_len: 4096 is more than the model's 2048"):
        start("run", "data.max_seq_len=4096")


def test_recompute_changes_no_number(start: Start) -> None:
    kept, _ = start("kept", "train.gradient_checkpointing=none", "train.num_epochs=1")
    again, _ = start("again", "train.gradient_checkpointing=full", "train.num_epochs=1")
    assert [line["loss"] for line in metrics(kept) if "loss" in line] == [
        line["loss"] for line in metrics(again) if "loss" in line
    ]
