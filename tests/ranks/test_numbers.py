"""The same numbers on one process and on several, however the rows of a step are shared."""

from pathlib import Path

import jobs
import pytest
import torch
from conftest import Launch, curve, made

SPLITS = {  # ranks, rows of a micro-batch, micro-batches: eight rows a step
    "two ranks": (2, 2, 2),
    "two ranks, row by row": (2, 1, 4),
    "four ranks": (4, 2, 1),
}


def over(split: tuple[int, int, int]) -> list[str]:
    _, rows, micro_batches = split
    return [f"train.batch_size={rows}", f"train.gradient_accumulation_steps={micro_batches}"]


def assert_same(run: Path, other: Path) -> None:
    ours, theirs = curve(run), curve(other)
    assert ours["tokens"] == theirs["tokens"] and len(ours["loss"]) > 4
    for key in ours:
        assert len(ours[key]) == len(theirs[key]) > 1
        torch.testing.assert_close(torch.tensor(theirs[key]), torch.tensor(ours[key]), rtol=1e-5, atol=1e-6)
    weights = made(other)
    assert made(run).keys() == weights.keys()
    for name, weight in made(run).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("method", "sharding"),
    [
        *(("lora", "replicate"), ("qlora", "full"), ("full", "full"), ("full", "hybrid")),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (
                *(("qlora", "replicate"), ("full", "replicate")),
                *(("lora", "full"), ("lora", "hybrid"), ("qlora", "hybrid")),
            )
        ),
    ],
)
def test_ranks_change_nothing(method: str, sharding: str, launch: Launch, recipe: Path, tmp_path: Path) -> None:
    arguments = [str(recipe), f"method={method}", "eval.samples=2", "eval.sample_tokens=4"]
    if method == "full":
        arguments += ["optim.learning_rate=1e-3"]
    alone = launch(1, jobs.train, [*arguments, f"out={tmp_path / 'alone'}"])
    assert alone.codes == [0], alone.logs
    names = {
        "replicate": SPLITS if method == "lora" else ["two ranks"],
        "full": ["two ranks", "four ranks"],
        "hybrid": ["four ranks"],
    }[sharding]
    arguments += [f"parallel.sharding={sharding}", "train.gradient_checkpointing=full"]
    for name in names:
        split, out = SPLITS[name], tmp_path / name.replace(" ", "-")
        machines = 2 if sharding == "hybrid" else 1
        ended = launch(split[0], jobs.train, [*arguments, *over(split), f"out={out}"], machines=machines)
        assert ended.codes == [0] * split[0], "\n".join(ended.logs)
        assert_same(tmp_path / "alone", out)
        assert "all steps done" in ended.logs[0] and not ended.logs[1]  # the first alone speaks


@pytest.mark.parametrize("micro_batches", [2, 3])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_every_micro_batch_gathers_the_same_weights(
    method: str, micro_batches: int, launch: Launch, recipe: Path, tmp_path: Path
) -> None:
    """With blocks that keep all they compute, as where memory is plenty."""
    arguments = [str(recipe), f"method={method}", "train.batch_size=1", "train.gradient_checkpointing=none"]
    arguments += ["train.max_steps=5", "eval.every_steps=2", "save.every_steps=0", "optim.learning_rate=1e-3"]
    alone = [*arguments, f"train.gradient_accumulation_steps={2 * micro_batches}", f"out={tmp_path / 'alone'}"]
    assert launch(1, jobs.train, alone).codes == [0]
    spread = [*arguments, *over((2, 1, micro_batches)), "parallel.sharding=full", f"out={tmp_path / 'spread'}"]
    ended = launch(2, jobs.train, spread)
    assert ended.codes == [0, 0], "\n".join(ended.logs)
    assert_same(tmp_path / "alone", tmp_path / "spread")


@pytest.mark.parametrize(
    ("mistake", "keys"),
    [
        ("each rank divides by its own tokens", ["method=lora"]),
        ("gradients are not summed", ["method=lora"]),
        ("clipped by this rank's part", ["method=full", "parallel.sharding=full"]),
    ],
)
def test_mistakes_would_be_seen(mistake: str, keys: list[str], launch: Launch, recipe: Path, tmp_path: Path) -> None:
    arguments = [str(recipe), *keys, "train.max_steps=2", "eval.every_steps=0"]
    assert launch(1, jobs.train, [*arguments, f"out={tmp_path / 'alone'}"]).codes == [0]
    arguments += [*over(SPLITS["two ranks"]), f"out={tmp_path / 'wrong'}"]
    ended = launch(2, jobs.train_wrong, arguments, mistake)
    assert ended.codes == [0, 0], ended.logs
    ours, theirs = (torch.tensor(curve(tmp_path / run)["grad_norm"]) for run in ("alone", "wrong"))
    assert ((ours - theirs).abs() > 1e-3 * ours).any()
