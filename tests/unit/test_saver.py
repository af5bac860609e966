"""Saving beside training: what a step waits for, what becomes of errors, and what is deleted when."""

import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from minitune import checkpoint, files, optim
from minitune.config import OptimConfig
from minitune.errors import RunFailed
from minitune.progress import Progress
from minitune.saver import Saver, Shelf, needed

# ---- which are needed ----------------------------------------------------------------------------------------------


def test_which_are_needed() -> None:
    assert needed({}, 3, None) == set()
    assert needed({2: None, 4: None, 6: None}, 2, None) == {4, 6}
    assert needed({2: 2, 4: 2, 6: 2}, 1, 2) == {2, 6}
    assert needed({2: 2, 4: 2, 6: 6}, 2, 6) == {2, 4, 6}  # of 4, to which the run may have to go back, 2 is the best
    assert needed({2: 2, 4: 4, 6: 6}, 1, 6) == {6}


class Imagined:
    """A run's checkpoints without files: what is there, which of it is valid, and what the run would go on from."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.keep_last = draw, draw.randint(1, 4)
        self.there: dict[int, tuple[int | None, float | None]] = {}  # step -> its best step and loss
        self.rotten: set[int] = set()
        self.step, self.best, self.loss = 0, None, None

    def act(self, decide=needed) -> None:
        """One thing that may happen, and then what must hold."""
        match self.draw.choices(["save", "rot", "kill", "limit"], [8, 1, 2, 1])[0]:
            case "save":
                self.step += self.draw.randint(1, 3)
                if self.draw.random() < 0.5:
                    loss = self.draw.random()
                    if self.loss is None or loss < self.loss:
                        self.best, self.loss = self.step, loss
                self.there[self.step] = (self.best, self.loss)
                self.rotten.discard(self.step)
                self.rotate(decide)
            case "rot" if self.there:
                self.rotten.add(self.draw.choice(list(self.there)))
            case "kill":
                while self.there and (newest := max(self.there)) in self.rotten:  # set aside, as a resume does
                    del self.there[newest]
                newest = max(self.there, default=0)
                self.step, (self.best, self.loss) = newest, self.there.get(newest, (None, None))
            case "limit":
                self.keep_last = self.draw.randint(1, 4)

    def rotate(self, decide) -> None:
        valid = {step: best for step, (best, _) in self.there.items() if step not in self.rotten}
        before = dict(self.there)
        keep = decide(valid, self.keep_last, self.best)
        self.there = {step: facts for step, facts in self.there.items() if step in keep}
        left = [step for step in valid if step in self.there]
        assert left[-self.keep_last :] == sorted(valid)[-self.keep_last :], "one of the newest valid ones is gone"
        assert self.best is None or self.best not in before or self.best in self.there, "the best is gone"
        for step in sorted(left)[-self.keep_last :]:
            best = self.there[step][0]
            assert best not in before or best in self.there, f"going back to {step}, the best of then is gone"
        assert len(self.there) <= 2 * self.keep_last + 1, "more are kept than are needed"


def test_ten_thousand_random_lives() -> None:
    for seed in range(10_000):
        run = Imagined(random.Random(seed))
        for _ in range(run.draw.randint(3, 25)):
            run.act()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda valid, keep_last, best: set(sorted(valid)[-keep_last:]),  # forgets the best
        lambda valid, keep_last, best: {*sorted(valid)[-keep_last:], best},  # and that of those to go back to
        lambda valid, keep_last, best: {*sorted(valid)[:keep_last], *needed({}, 1, best)},  # keeps the oldest
        lambda valid, keep_last, best: set(valid),  # deletes nothing
    ],
)
def test_a_wrong_decision_would_be_noticed(wrong) -> None:
    with pytest.raises(AssertionError):
        for seed in range(1000):
            run = Imagined(random.Random(seed))
            for _ in range(25):
                run.act(wrong)


# ---- the files -----------------------------------------------------------------------------------------------------


class Training:
    """A model that moves, and its saver."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(5, 3)
        self.optimizer, _ = optim.make_optimizer(self.model, OptimConfig())
        self.progress = Progress()

    def step(self) -> None:
        self.model(torch.randn(2, 5)).square().sum().backward()
        self.optimizer.step()
        self.progress.step += 1

    def save(self, saver: Saver, best: bool = False) -> None:
        self.step()
        if best:
            self.progress.best_step, self.progress.best_loss = self.progress.step, 1.0 / self.progress.step
        saver.save(self.model, self.optimizer, self.progress)


@pytest.fixture
def training() -> Training:
    return Training()


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)]


def test_the_last_and_the_best_are_left_and_nothing_half_made(tmp_path: Path, training: Training) -> None:
    with Saver(tmp_path, 2, {}, 0) as saver:
        for number in range(1, 8):
            training.save(saver, best=number in (2, 3))
    assert steps(tmp_path) == [3, 6, 7]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000006",
        "step-000007",
    ]
    assert all(checkpoint.damaged(path) is None for path in checkpoint.checkpoints(tmp_path))


def test_a_step_does_not_wait_for_the_disk_but_the_next_save_does(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, real, writing = threading.Event(), checkpoint.write, []

    def slow(run: Path, snapshot: checkpoint.Snapshot) -> Path:
        writing.append(snapshot.step)
        assert may_write.wait(30)
        return real(run, snapshot)

    monkeypatch.setattr(checkpoint, "write", slow)
    with Saver(tmp_path, 3, {}, 0) as saver:
        training.save(saver)
        saved = training.model.weight.detach().clone()
        for _ in range(3):
            training.step()
            saver.check()
        assert not steps(tmp_path)
        threading.Timer(0.2, may_write.set).start()
        training.save(saver)  # waits for the one before
        assert 1 in steps(tmp_path)
    assert steps(tmp_path) == [1, 5] and writing == [1, 5]
    loaded = checkpoint.read_tensors(tmp_path / "checkpoints" / "step-000001" / "trained.safetensors")
    assert torch.equal(loaded["weight"], saved) and not torch.equal(saved, training.model.weight)


def test_a_step_is_saved_once(tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    real = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: written.append(args[1].step) or real(*args))
    training.progress.step = 3
    with Saver(tmp_path, 3, {}, 4) as saver:
        for _ in range(3):
            training.progress.step = 4
            saver.save(training.model, training.optimizer, training.progress)
        training.save(saver)
        saver.save(training.model, training.optimizer, training.progress)
    assert written == [5]


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json", "step-000003"])
def test_an_error_in_the_writer_ends_the_run_and_leaves_the_others(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(RunFailed, match=r"checkpoint 3 could not be written \(No space left.*are whole"):  # noqa: SIM117
        with Saver(tmp_path, 1, {}, 0) as saver:
            training.save(saver)
            training.save(saver)
            saver.wait()
            full_disk(monkeypatch, name)
            training.save(saver)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                training.step()
                saver.check()
            pytest.fail("the run went on")
    assert steps(tmp_path) == [2] and checkpoint.damaged(tmp_path / "checkpoints" / "step-000002") is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_an_error_in_the_very_last_save_is_not_lost(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, "step-000001")
    with pytest.raises(RunFailed, match="checkpoint 1 could not be written"), Saver(tmp_path, 1, {}, 0) as saver:
        training.save(saver)


def test_what_came_first_ends_the_run_after_the_save_under_way(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: time.sleep(0.2) or real(*arguments))
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, 1, {}, 0) as saver:
        training.save(saver)
        raise ZeroDivisionError
    assert steps(tmp_path) == [1]
    full_disk(monkeypatch, "step-000002")
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, 1, {}, 1) as saver:
        training.save(saver)
        raise ZeroDivisionError
    assert "checkpoint 2 could not be written" in capsys.readouterr().out


def test_poisoned_weights_take_no_place(tmp_path: Path, training: Training) -> None:
    with pytest.raises(RunFailed, match="checkpoint 2 was not kept"), Saver(tmp_path, 1, {}, 0) as saver:
        training.save(saver)
        with torch.no_grad():
            training.model.weight[0, 0] = float("nan")
        training.progress.step += 1
        saver.save(training.model, training.optimizer, training.progress)
    assert steps(tmp_path) == [1]


def test_a_mistake_of_ones_own_is_not_called_a_full_disk(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: {}["missing"])
    with pytest.raises(KeyError), Saver(tmp_path, 1, {}, 0) as saver:
        training.save(saver)


def test_damaged_ones_do_not_count(tmp_path: Path, training: Training) -> None:
    """Of five, the fourth rots after it was verified: three valid ones are left, not two and it."""
    with Saver(tmp_path, 9, {}, 0) as saver:
        for _ in range(4):
            training.save(saver)
        saver.wait()
        victim = tmp_path / "checkpoints" / "step-000004" / "trained.safetensors"
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        saver.keep_last = 3
        training.save(saver)
    assert steps(tmp_path) == [2, 3, 5]


def test_each_is_looked_at_once(tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(tmp_path, 3, {}, 0) as saver:
        for _ in range(3):
            training.save(saver)
    looked = []
    real = checkpoint.damaged
    monkeypatch.setattr(checkpoint, "damaged", lambda path: looked.append(path.name) or real(path))
    shelf = Shelf(tmp_path)
    assert shelf.valid() == shelf.valid() == dict.fromkeys([1, 2, 3])
    assert looked == ["step-000001", "step-000002", "step-000003"]


def test_what_cannot_be_deleted_is_said_and_training_goes_on(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).name == "step-000001":
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with Saver(tmp_path, 1, {}, 0) as saver:
        for _ in range(3):
            training.save(saver)
    assert "step-000001 is not needed any more, and cannot be deleted (Permission denied)" in capsys.readouterr().out
    assert steps(tmp_path) == [1, 3]


def test_metrics_are_on_the_disk_before_the_checkpoint_that_follows_them(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, real = [], files.sync
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with Saver(tmp_path, 1, {}, 0) as writer:
        monkeypatch.setattr(files, "sync", lambda path: order.append(path.name) or real(path))
        training.save(writer)
    assert order[0] == "metrics.jsonl" and order[-1] == "checkpoints"
