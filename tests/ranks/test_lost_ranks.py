"""What befalls one rank, all come to know: the job ends, says who it was, and goes on from its last checkpoint."""

from pathlib import Path

import jobs
import pytest
import torch
from conftest import Launch, curve, made, shown

TIMEOUT = 5  # seconds that a rank may not move


@pytest.fixture
def arguments(recipe: Path) -> list[str]:
    return [str(recipe), "train.gradient_accumulation_steps=2", f"parallel.timeout_seconds={TIMEOUT}"]


QUICK = {"raises": "rank 1: ValueError: a mistake on one rank", "hangs": f"rank 1 did not move for {TIMEOUT} s"}
SLOW = {"is killed": "rank 1 died", "is stopped": f"rank 1 did not move for {TIMEOUT} s"}


@pytest.mark.parametrize("troubles", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_a_rank_s_trouble_ends_the_job_with_its_name_and_a_new_start_goes_on_bit_for_bit(
    troubles: dict[str, str], arguments: list[str], launch: Launch, tmp_path: Path
) -> None:
    whole = launch(2, jobs.train, [*arguments, f"out={tmp_path / 'whole'}"])
    assert whole.codes == [0, 0], whole.logs
    for what, says in troubles.items():
        out = tmp_path / what.replace(" ", "-")
        ended = launch(2, jobs.train, [*arguments, f"out={out}"], {"rank": 1, "step": 5, "what": what})
        assert 0 not in ended.codes and ended.seconds < TIMEOUT + 15, ended
        assert sum(log.count(f"failed: {says}") for log in ended.logs) == 1, ended.logs
        assert "Traceback" not in ended.logs[0]  # which has done nothing wrong
        assert not (out / "adapter").exists()

        again = launch(2, jobs.train, [*arguments, f"out={out}"])
        assert again.codes == [0, 0] and "going on from step-000004" in again.logs[0], again.logs
        assert curve(out) == curve(tmp_path / "whole")
        assert all(torch.equal(made(out)[name], weight) for name, weight in made(tmp_path / "whole").items())


def test_the_first_rank_may_die_too(arguments: list[str], launch: Launch, tmp_path: Path) -> None:
    ended = launch(2, jobs.train, [*arguments, f"out={tmp_path / 'run'}"], {"rank": 0, "step": 3, "what": "is killed"})
    assert 0 not in ended.codes and ended.seconds < TIMEOUT + 15
    assert "rank 1" in ended.logs[1] and "Traceback" not in ended.logs[1], ended.logs[1]


def test_a_first_rank_that_is_frozen_ends_the_job(arguments: list[str], launch: Launch, tmp_path: Path) -> None:
    """It keeps what the ranks tell each other, so nobody can ask who it was."""
    ended = launch(2, jobs.train, [*arguments, f"out={tmp_path / 'run'}"], {"rank": 0, "step": 3, "what": "is stopped"})
    assert 0 not in ended.codes and ended.seconds < TIMEOUT + 15
    assert f"failed: rank 0 did not answer for {TIMEOUT} s" in ended.logs[1], ended.logs[1]


def test_sigterm_on_one_rank_saves_on_all(arguments: list[str], launch: Launch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = launch(2, jobs.train, [*arguments, f"out={out}"], {"rank": 1, "step": 2, "what": "gets SIGTERM"})
    assert ended.codes == [143, 143], ended.logs
    assert shown(out)["step"] == 3 and (out / "checkpoints" / "step-000003").is_dir()
    assert sum(log.count("SIGTERM: stopped after step 3") for log in ended.logs) == 1, ended.logs
    assert launch(2, jobs.train, [*arguments, f"out={out}"]).codes == [0, 0]


def test_another_number_of_ranks_goes_on_where_the_first_stopped(recipe: Path, launch: Launch, tmp_path: Path) -> None:
    """One, then two, then four ranks on one run: the same as one rank all the way, to rounding."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert launch(1, jobs.train, [str(recipe), f"out={alone}"]).codes == [0]
    for ranks, micro_batches, stop in ((1, 4, 1), (2, 2, 3), (4, 1, None)):
        trouble = {"rank": ranks - 1, "step": stop, "what": "gets SIGTERM"} if stop else None
        arguments = [str(recipe), f"train.gradient_accumulation_steps={micro_batches}", f"out={run}"]
        ended = launch(ranks, jobs.train, arguments, trouble)
        assert ended.codes == [143 if stop else 0] * ranks, ended.logs
    assert curve(run)["tokens"] == curve(alone)["tokens"]
    for key, values in curve(alone).items():
        torch.testing.assert_close(torch.tensor(curve(run)[key]), torch.tensor(values), rtol=1e-5, atol=1e-6)
    for name, weight in made(alone).items():
        torch.testing.assert_close(made(run)[name], weight, rtol=1e-5, atol=1e-5)


def test_other_rows_a_step_are_refused_once(recipe: Path, launch: Launch, tmp_path: Path) -> None:
    arguments = [str(recipe), f"out={tmp_path / 'run'}"]
    assert launch(1, jobs.train, arguments, {"rank": 0, "step": 1, "what": "gets SIGTERM"}).codes == [143]
    ended = launch(2, jobs.train, arguments)
    assert ended.codes == [2, 2]
    assert sum(log.count("x processes): 8 then, 16 now") for log in ended.logs) == 1, ended.logs


def test_masks_of_dropout_are_those_of_the_rows_where_a_micro_batch_is_one_row(
    recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    common = [str(recipe), "lora.dropout=0.3", "train.batch_size=1"]
    for ranks, micro_batches in ((1, 8), (2, 4)):
        arguments = [*common, f"train.gradient_accumulation_steps={micro_batches}", f"out={tmp_path / str(ranks)}"]
        assert launch(ranks, jobs.train, arguments).codes == [0] * ranks
    one, two = curve(tmp_path / "1"), curve(tmp_path / "2")
    torch.testing.assert_close(torch.tensor(two["loss"]), torch.tensor(one["loss"]), rtol=1e-5, atol=1e-6)
    plain = tmp_path / "plain"
    launch(1, jobs.train, [*common[:1], f"out={plain}"])
    assert abs(curve(plain)["loss"][-1] - one["loss"][-1]) > 1e-4  # it did drop something
