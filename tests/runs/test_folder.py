"""Whose a folder is: what is somebody's own is not written over, and a run knows its own wherever it was cut."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Start, metrics

from minitune import checkpoint, files, lock, runs, train
from minitune.errors import Interrupted, RunFailed, UserError
from minitune.saver import Saver


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def somebodys(run: Path, name: str) -> dict[str, bytes]:
    """Put what is no run's where a run would write."""
    path = run / name
    if "." not in name:
        path = path / "notes.txt"
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": "for years"}')
    return tree(run)


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", runs.NAMES)
def test_what_is_somebodys_own_is_not_written_over(start: Start, tmp_path: Path, name: str, resume: str) -> None:
    before = somebodys(tmp_path / "run", name)
    with pytest.raises(UserError) as refused:
        start("run", f"train.resume={resume}")
    said = str(refused.value)
    assert str(tmp_path / "run") in said and "another" in said and "\n" not in said
    if resume == "auto":
        assert f"{tmp_path / 'run' / name} is in the way" in said and "move it" in said
    assert tree(tmp_path / "run") == before and not (tmp_path / "run.1").exists()


def test_it_would_be_written_over(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else than the refusal keeps it."""
    monkeypatch.setattr(runs, "refuse_others", lambda run: None)
    for name in ("config.toml", "model"):
        before = somebodys(tmp_path / name, name)
        run, _ = start(name, "train.max_steps=1", "method=full")
        assert before.items() - tree(run).items()


def test_everything_in_the_way_is_named_and_other_files_are_not(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "config.toml", "README.md"):
        (run / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{run}/config\.toml, {run}/metrics\.jsonl are in the way"):
        start("run")
    for name in ("metrics.jsonl", "config.toml"):
        (run / name).unlink()
    _, facts = start("run", "train.max_steps=1")
    assert facts["finished"] and (run / "README.md").read_text() == "mine"


class Killed(BaseException):
    """Stands for kill -9."""


def die_at(patch: pytest.MonkeyPatch, nth: int, run: Path) -> list[str]:
    """Die before the n-th rename in a run's folder, by which each of its files appears; returns what has appeared."""
    real, seen = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if run in Path(target).parents:
            if len(seen) + 1 == nth:
                raise Killed
            seen.append(Path(target).name)
        real(source, target)

    patch.setattr(os, "replace", replace)
    return seen


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_first_start_that_is_cut_at_any_moment_is_known_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    short = ("train.max_steps=1", "data.eval_fraction=0")
    straight, _ = start("straight", *short)
    for nth in range(1, 20):
        name = f"run{nth}"
        with monkeypatch.context() as patch:
            appeared = die_at(patch, nth, tmp_path / name)
            with pytest.raises(Killed):
                start(name, *short)
        assert not appeared or appeared[0] == "run.json"
        run, facts = start(name, *short, f"train.resume={resume}")
        assert facts["finished"] and losses(run) == losses(straight)
        assert run.with_name(f"{name}.1").exists() == (resume == "never" and bool(appeared))
        if "state.json" in appeared:
            break
    assert appeared[:3] == ["run.json", "left_out.jsonl", "config.toml"]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def test_another_order_would_not_be_known_again(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe first, and then the death."""
    with monkeypatch.context() as patch:
        patch.setattr(runs, "note", lambda run, *facts: files.write_text(run / "config.toml", "") and None)
        appeared = die_at(patch, 2, tmp_path / "run")
        with pytest.raises(Killed):
            start("run")
    assert appeared == ["config.toml"]
    with pytest.raises(UserError, match="is in the way"):
        start("run")


@pytest.mark.parametrize("lost", ["run.json", "checkpoints"])
def test_either_mark_is_enough(start: Start, tmp_path: Path, lost: str) -> None:
    run, facts = start("run", "train.max_steps=2")
    (run / lost).rename(tmp_path / "lost")
    (run / "adapter" / "adapter_config.json").unlink()
    assert runs.is_run(run)
    _, again = start("run", "train.max_steps=2")
    assert again["made"] == facts["made"]


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"identity": [1]}), "[" * 100_000])
def test_a_run_json_that_is_no_runs_marks_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert not runs.is_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"identity": {}}))
    assert runs.is_run(tmp_path)


# ---- a run that has finished, and what was done to it since ----------------------------------------------------------

SHORT = ("train.max_steps=2", "save.every_steps=1")


def edit(run: Path) -> str:
    """Of the user: another name for the base, in what was handed over."""
    file = run / "adapter" / "adapter_config.json"
    told = json.loads(file.read_text()) | {"base_model_name_or_path": "me/my-base"}
    file.write_text(json.dumps(told))
    return file.read_text()


def damage_all(run: Path) -> None:
    for path in checkpoint.checkpoints(run):
        (path / "state.json").write_text("x")


HARMS: dict[str, Callable[[Path], object]] = {
    "no checkpoints, and an edited file": lambda run: (shutil.rmtree(run / "checkpoints"), edit(run)),
    "no checkpoints, and nothing handed over": lambda run: [shutil.rmtree(run / n) for n in ("checkpoints", "adapter")],
    "all checkpoints damaged, and nothing handed over": lambda run: (damage_all(run), shutil.rmtree(run / "adapter")),
    "nothing": lambda run: None,
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused_whatever_is_left(start: Start, tmp_path: Path, harm: str, finished: bool) -> None:
    run, _ = start("run", *SHORT)
    if not finished:
        files.write_json(run / "run.json", files.read_json(run / "run.json") | {"finished": False})
    HARMS[harm](run)
    before = tree(run)
    with pytest.raises(UserError, match=r"(?s)run\.json belongs to a run that differs.*seed: 3 then, 7 now"):
        start("run", *SHORT, "seed=7", "lora.r=2")
    assert tree(run) == before
    again, facts = start("run", *SHORT, "seed=7", "train.resume=never")
    assert facts["finished"] and tree(again.with_name("run.1")) == before


def test_it_would_be_lost(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = start("run", *SHORT)
    HARMS["no checkpoints, and an edited file"](run)
    monkeypatch.setattr(runs, "refuse_another", lambda run, identity: None)
    before = (run / "metrics.jsonl").read_bytes()
    start("run", *SHORT, "seed=7")
    assert (run / "metrics.jsonl").read_bytes() != before


@pytest.mark.parametrize("checkpoints", [True, False])
def test_an_edited_file_is_kept(start: Start, capsys: pytest.CaptureFixture[str], checkpoints: bool) -> None:
    """The same recipe again: what the run made is made anew, beside what was edited."""
    run, facts = start("run", *SHORT)
    if not checkpoints:
        shutil.rmtree(run / "checkpoints")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter" / "README.md").write_text("of mine")
    text = edit(run)
    _, again = start("run", *SHORT)
    assert again["made"] == facts["made"] and (run / "adapter.kept" / "README.md").read_text() == "of mine"
    assert (run / "adapter.kept" / "adapter_config.json").read_text() == text
    assert f"adapter is set aside as {run / 'adapter.kept'}" in capsys.readouterr().out
    edit(run)
    start("run", *SHORT)
    assert (run / "adapter.kept.2").exists()


def test_what_is_as_it_was_made_is_not_kept_twice(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run, facts = start("run", *SHORT)
    (run / "adapter" / "adapter_config.json").unlink()
    _, again = start("run", *SHORT)
    assert again["made"] == facts["made"] and not (run / "adapter.kept").exists()
    with monkeypatch.context() as patch:  # cut when it had handed over
        shutil.rmtree(run / "adapter")
        patch.setattr(runs, "made", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start("run", *SHORT)
    assert (run / "adapter").exists()
    start("run", *SHORT)
    assert not (run / "adapter.kept").exists()


def test_a_file_that_has_grown_is_not_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file has any size for nothing; run.json says how large it was."""
    run, facts = start("run", *SHORT)
    os.truncate(run / "adapter" / "adapter_model.safetensors", 2**40)
    real = files.sha256
    monkeypatch.setattr(
        files, "sha256", lambda file: real(file) if file.stat().st_size < 2**30 else pytest.fail("read")
    )
    assert runs.what_is_missing(run, facts) == "adapter/adapter_model.safetensors has changed"


# ---- a folder that is moved under its run ----------------------------------------------------------------------------


def move(run: Path, moved: Path, anew: bool) -> None:
    run.rename(moved)
    if anew:
        run.mkdir()


def move_at(patch: pytest.MonkeyPatch, where: str, act: Callable[[], None]) -> None:
    """Before the sixth step begins, or something else for the first time."""
    owner, name, nth = {
        "step": (train, "take_step", 6),
        "before a save's first call": (checkpoint, "write", 2),
        "inside a save": (checkpoint, "damaged", 2),
        "handing over": (train, "hand_over", 1),
        "the last note": (runs, "made", 1),
    }[where]
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: object, **options: object) -> object:
        if next(calls) == nth:
            act()
        return real(*arguments, **options)

    patch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("where", "anew", "board"),
    [
        ("step", False, "true"),  # TensorBoard opens its file by name for each line
        ("step", True, "false"),
        ("before a save's first call", True, "false"),
        ("inside a save", False, "false"),
        ("handing over", True, "false"),
        ("the last note", False, "false"),
    ],
)
def test_a_moved_folder_ends_the_run_and_nothing_is_written_in_its_place(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, anew: bool, board: str
) -> None:
    """What was moved is whole, and goes on exactly when it is back."""
    more = ("train.max_steps=6", f"log.tensorboard={board}")
    straight, _ = start("straight", *more)
    run, moved = tmp_path / "run", tmp_path / "moved"
    with monkeypatch.context() as patch:
        move_at(patch, where, lambda: move(run, moved, anew))
        with pytest.raises(RunFailed, match=r"run was moved or deleted while .*; move it back") as told:
            start("run", *more)
    assert "\n" not in str(told.value) and str(run) in str(told.value)
    assert run.exists() == anew and not (anew and list(run.rglob("*")))
    assert not (moved / "run.lock").exists() and not lock.held
    if anew:
        run.rmdir()
    moved.rename(run)
    _, facts = start("run", *more)
    assert facts["finished"] and losses(run) == losses(straight)


def test_half_a_run_would_be_written_in_its_place(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    monkeypatch.setattr(lock, "must_be_there", lambda run: None)
    move_at(monkeypatch, "handing over", lambda: move(run, moved, True))
    start("run")
    assert (run / "adapter").exists() and not (run / "config.toml").exists()


def test_a_signal_in_a_moved_folder_that_is_saved_is_a_signal(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing had to be written but a note of it, which is left out."""
    run, moved = tmp_path / "run", tmp_path / "moved"

    def act() -> None:
        move(run, moved, False)
        os.kill(os.getpid(), signal.SIGTERM)

    move_at(monkeypatch, "step", act)
    real = Saver.save
    monkeypatch.setattr(Saver, "save", lambda self, *state: moved.exists() or (real(self, *state), self.wait()))
    with pytest.raises(Interrupted):
        start("run")
    assert not run.exists()
