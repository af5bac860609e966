"""A checkpoint is used if it is whole, of this run, and such as a run leaves it; else it is set aside by name."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from minitune import checkpoint, files, optim
from minitune.checkpoint import Damaged
from minitune.config import Config, LoRAConfig, OptimConfig, TrainConfig
from minitune.data.packing import Corpus
from minitune.data.stream import Stream
from minitune.errors import UserError
from minitune.identity import identity_of
from minitune.masters import MasterAdamW
from minitune.progress import Progress
from minitune.resume import resume, unfit

IDENTITY = {"seed": 3, "lora.r": 4, "the data": ["0a" * 32]}


@dataclass
class State:
    """All that a checkpoint is of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    stream: Stream
    progress: Progress

    def steps(self, number: int) -> None:
        for _ in range(number):
            x = torch.randn(4, 9, generator=torch.Generator().manual_seed(self.progress.step))
            loss = self.model(x.to(self.model[0].weight.dtype)).float().square().sum()
            loss.backward()
            optim.update(self.model, self.optimizer, 1.0, loss.detach())
            self.optimizer.zero_grad()
            self.stream.next_step()
            self.progress.step += 1
            self.progress.tokens += 11
            self.progress.stream = self.stream.state()

    def weights(self) -> dict[str, bytes]:
        return {name: bytes(files.raw_bytes(p)) for name, p in self.model.named_parameters()}

    def moments(self) -> dict[str, bytes]:
        return {name: bytes(files.raw_bytes(t)) for name, t in optim.state(self.model, self.optimizer)[0].items()}


def fresh(kind: str = "adamw") -> State:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))
    if kind == "masters":
        model.to(torch.bfloat16)
    optimizer, _ = optim.make_optimizer(model, OptimConfig(learning_rate=1e-2))
    assert isinstance(optimizer, MasterAdamW) == (kind == "masters")
    corpus = Corpus.from_documents(([n] * n, [True] * n) for n in range(3, 12))
    stream = Stream(corpus, max_seq_len=16, packing=True, batch_size=1, accumulation=1, pad_id=0, seed=1)
    return State(model, optimizer, stream, Progress(stream=stream.state()))


@pytest.fixture
def written(tmp_path: Path) -> State:
    """A run with checkpoints of steps 2 and 4."""
    state = fresh()
    for _ in range(2):
        state.steps(2)
        write(tmp_path, state)
    return state


def write(run: Path, state: State) -> Path:
    (run / "checkpoints").mkdir(exist_ok=True)
    return checkpoint.write(run, checkpoint.snapshot(state.model, state.optimizer, state.progress, IDENTITY))


def go_on(run: Path, kind: str = "adamw", identity: dict[str, Any] = IDENTITY) -> tuple[State, Progress | None, str]:
    """A fresh start in `run`: what it has then, how far it had come, and what was said."""
    state, said = fresh(kind), []
    found = resume(run, state.model, state.optimizer, state.stream, identity, said.append)
    return state, found, "\n".join(said)


def newest(run: Path) -> Path:
    return checkpoint.checkpoints(run)[-1]


def remake(path: Path, **changed: Callable[[Any], Any] | bytes) -> None:
    """Change files of a checkpoint (trained, optimizer: tensors; state: JSON) and write the manifest anew to fit."""
    for what, change in changed.items():
        file = path / ("state.json" if what == "state" else f"{what}.safetensors")
        if isinstance(change, bytes):
            file.write_bytes(change)
        elif what == "state":
            file.write_text(json.dumps(change(json.loads(file.read_text()))))
        else:
            save_file(change(load_file(file)), file)
    manifest = {
        name: {"bytes": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in checkpoint.FILES
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


# ---- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "masters"])
def test_what_is_resumed_is_what_was_saved_and_goes_on_alike(tmp_path: Path, kind: str) -> None:
    straight = fresh(kind)
    straight.steps(3)
    path = write(tmp_path, straight)
    state, progress, said = go_on(tmp_path, kind)
    assert progress == straight.progress and said == f"going on from {path.name}"
    assert state.weights() == straight.weights() and state.moments() == straight.moments()
    assert state.stream.state() == straight.stream.state()
    assert state.weights() != fresh(kind).weights()
    state.progress = progress
    cold = fresh(kind)
    for each in (straight, state, cold):
        each.steps(4)
    assert state.weights() == straight.weights() and state.moments() == straight.moments()
    assert cold.weights() != straight.weights()


def test_a_snapshot_does_not_move_with_training() -> None:
    state = fresh()
    state.steps(1)
    taken = checkpoint.snapshot(state.model, state.optimizer, state.progress, IDENTITY)
    before = {name: bytes(files.raw_bytes(t)) for name, t in (taken.trained | taken.optimizer).items()}
    told = json.dumps(taken.state)
    state.steps(2)
    assert before == {name: bytes(files.raw_bytes(t)) for name, t in (taken.trained | taken.optimizer).items()}
    assert json.dumps(taken.state) == told
    assert before != state.weights() | state.moments()


def test_the_files(tmp_path: Path, written: State) -> None:
    path = newest(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == sorted([*checkpoint.FILES, "manifest.json"])
    old = os.umask(0o027)
    try:
        state = fresh()
        state.steps(6)
        other = write(tmp_path, state)
    finally:
        os.umask(old)
    assert other.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in other.iterdir()} == {0o640}
    manifest = json.loads((path / "manifest.json").read_text())
    for name, facts in manifest.items():
        data = (path / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_tensor_files_are_byte_for_byte_the_library_s(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {f"of.{number}": (torch.randn(5, 3) * 9).to(kind) for number, kind in enumerate(kinds)}
    tensors |= {
        'é"\\ \n': torch.zeros(()),
        "empty": torch.zeros(0, 4),
        "b": torch.randn(7),
        "turned": torch.randn(4, 6).t(),
    }
    digest = files.write_tensors(tmp_path / "ours", tensors)
    theirs = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == theirs
    assert digest == hashlib.sha256(theirs).hexdigest()
    assert files.write_tensors(tmp_path / "none", {}) and load_file(tmp_path / "none") == {}


def test_what_the_disk_gives_back_wrong_never_becomes_a_checkpoint(
    tmp_path: Path, written: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that turns between writing and reading back."""

    def rot(path: Path) -> None:
        if path.name == "optimizer.safetensors":
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(files, "forget", rot)
    written.steps(1)
    with pytest.raises(OSError, match=r"read back, optimizer\.safetensors is not what was written"):
        write(tmp_path, written)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000004"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("where", ["weights", "moments"])
@pytest.mark.parametrize("kind", ["adamw", "masters"])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path, where: str, kind: str) -> None:
    state = fresh(kind)
    state.steps(1)
    with torch.no_grad():
        place = state.model[2].weight
        (place if where == "weights" else state.optimizer.state[place]["exp_avg"])[1, 1] = float("inf")
    with pytest.raises(Damaged, match="numbers that cannot be"):
        write(tmp_path, state)
    assert not checkpoint.checkpoints(tmp_path)


# ---- what is set aside ---------------------------------------------------------------------------------------------


def test_every_byte_that_turns_is_noticed(tmp_path: Path, written: State) -> None:
    path = newest(tmp_path)
    for name in (*checkpoint.FILES, "manifest.json"):
        data = (path / name).read_bytes()
        for at in range(0, len(data), max(1, len(data) // 40)):
            turned = bytearray(data)
            turned[at] ^= 1 << at % 8
            (path / name).write_bytes(turned)
            if name != "manifest.json" or json_differs(bytes(turned), data):
                assert checkpoint.damaged(path), (name, at)
        (path / name).write_bytes(data)
        assert checkpoint.damaged(path) is None


def json_differs(one: bytes, other: bytes) -> bool:
    """Whether they say other things: white space between the words of a manifest says nothing."""
    try:
        return json.loads(one) != json.loads(other)
    except ValueError:
        return True


Harm = Callable[[Path], object]
NUMBERS = json.dumps(dict.fromkeys(checkpoint.FILES, 1))
HARMS: dict[str, Harm] = {
    "truncated": lambda path: os.truncate(path / "trained.safetensors", 100),
    "emptied": lambda path: os.truncate(path / "state.json", 0),
    "deleted": lambda path: (path / "optimizer.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "link": lambda path: link(path / "trained.safetensors"),
    "fifo": lambda path: fifo(path / "state.json"),
    "manifest is a fifo": lambda path: fifo(path / "manifest.json"),
    "manifest is a list": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest is nested": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "manifest of other files": lambda path: (path / "manifest.json").write_text('{"../x": {"bytes": 0, "sha256": ""}}'),
    "manifest without digests": lambda path: (path / "manifest.json").write_text(
        json.dumps(dict.fromkeys(checkpoint.FILES, 1))
    ),
    "manifest is vast": lambda path: os.truncate(path / "manifest.json", checkpoint.MOST_JSON + 1),
    "a file in its place": lambda path: replaced(path, Path.touch),
    "a link in its place": lambda path: replaced(path, lambda place: place.symlink_to(path.parent)),
    "a pipe in its place": lambda path: replaced(path, os.mkfifo),
}


def link(file: Path) -> None:
    file.rename(file.with_suffix(".real"))
    file.symlink_to(file.with_suffix(".real").name)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replaced(path: Path, by: Callable[[Path], object]) -> None:
    files.remove(path)
    by(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("harm", HARMS)
def test_the_damaged_one_is_set_aside_and_the_one_before_used(tmp_path: Path, written: State, harm: str) -> None:
    HARMS[harm](newest(tmp_path))
    state, progress, said = go_on(tmp_path)
    assert progress.step == 2 and "step-000004 is damaged (" in said and "set aside as step-000004.bad" in said
    assert said.endswith("going on from step-000002") and len(said.splitlines()) == 2
    straight = fresh()
    straight.steps(2)
    assert state.weights() == straight.weights() and state.moments() == straight.moments()
    assert state.stream.state() == straight.stream.state()


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def progress_with(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: state | {"progress": state["progress"] | values}


def one(value: float, key: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Set the last number of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[key].view(-1)[-1] = value
        return tensors

    return change


MADE_BY_HAND = {  # with a manifest that fits
    "no moments": {"optimizer": lambda t: {}},
    "moments of one missing": {"optimizer": lambda t: {k: v for k, v in t.items() if not k.startswith("0.bias")}},
    "one moment missing": {"optimizer": lambda t: without(t, "0.bias.exp_avg")},
    "foreign moments": {"optimizer": lambda t: t | {"9.weight.exp_avg": torch.zeros(2)}},
    "NaN in moments": {"optimizer": one(float("nan"), "0.weight.exp_avg")},
    "squares below zero": {"optimizer": one(-1.0, "0.weight.exp_avg_sq")},
    "moments in bf16": {"optimizer": lambda t: t | {"0.bias.exp_avg": t["0.bias.exp_avg"].bfloat16()}},
    "moments turned": {"optimizer": lambda t: t | {"0.weight.exp_avg": t["0.weight.exp_avg"].t().contiguous()}},
    "steps of another count": {"optimizer": lambda t: {k: v + k.endswith("step") for k, v in t.items()}},
    "steps that differ": {"optimizer": one(7.0, "2.bias.step")},
    "steps in a row": {"optimizer": lambda t: t | {"2.bias.step": torch.ones(3)}},
    "NaN weights": {"trained": one(float("nan"), "0.weight")},
    "infinite weights": {"trained": one(float("inf"), "2.bias")},
    "weights in fp64": {"trained": lambda t: {k: v.double() for k, v in t.items()}},
    "weights of another shape": {"trained": lambda t: t | {"0.bias": torch.zeros(8)}},
    "weights missing": {"trained": lambda t: without(t, "0.bias")},
    "weights too many": {"trained": lambda t: t | {"extra": torch.zeros(1)}},
    "no safetensors": {"trained": b"\x80\x04N."},
    "header of 2^60 bytes": {"optimizer": (2**60).to_bytes(8, "little") + b"{}"},
    "state is a list": {"state": lambda s: [s]},
    "state is nested deeper than is read": {"state": lambda s: s | {"identity": {"seed": deep(70)}}},
    "state is nested": {"state": b'{"identity": ' + b"[" * 90_000 + b"]" * 90_000 + b"}"},
    "state nested as deep as is read": {"state": lambda s: s | {"identity": {"seed": deep(60)}}},
    "no progress": {"state": lambda s: without(s, "progress")},
    "progress is a list": {"state": lambda s: s | {"progress": [1]}},
    "progress lacks one": {"state": lambda s: s | {"progress": without(s["progress"], "tokens")}},
    "progress has more": {"state": progress_with(more=1)},
    "step of 10^400": {"state": lambda s: progress_with(step=10**400)(s) | {"step": 10**400}},
    "tokens of 10^400": {"state": progress_with(tokens=10**400)},
    "tokens below zero": {"state": progress_with(tokens=-1)},
    "step is true": {"state": lambda s: progress_with(step=True)(s) | {"step": True}},
    "step of another folder": {"state": lambda s: progress_with(step=2)(s) | {"step": 2}},
    "best is infinite": {"state": progress_with(best_loss=float("inf"))},
    "best is to come": {"state": progress_with(best_step=99)},
    "more skipped than steps": {"state": progress_with(skipped=5)},
    "cursor elsewhere": {"state": lambda s: progress_with(stream=s["progress"]["stream"] | {"step": 1})(s)},
    "cursor of 10^400": {"state": lambda s: progress_with(stream=s["progress"]["stream"] | {"epoch": 10**400})(s)},
    "cursor is empty": {"state": progress_with(stream={})},
    "identity is a list": {"state": lambda s: s | {"identity": [1]}},
    "numbers are a list": {"state": lambda s: s | {"optimizer": [1]}},
    "numbers are vast": {"state": lambda s: s | {"optimizer": {"0.bias.step": 10**400}}},
    "numbers of nothing": {"state": lambda s: s | {"optimizer": {"0.bias.other": 1}}},
}


def deep(levels: int) -> Any:
    value: Any = 3
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", MADE_BY_HAND)
def test_what_no_run_would_leave_is_not_taken_though_its_manifest_fits(
    tmp_path: Path, written: State, case: str
) -> None:
    path = newest(tmp_path)
    remake(path)
    assert checkpoint.damaged(path) is None
    remake(path, **MADE_BY_HAND[case])
    if case == "state nested as deep as is read":
        with pytest.raises(UserError, match="seed"):
            go_on(tmp_path)
        return
    state, progress, said = go_on(tmp_path)
    assert progress.step == 2 and "step-000004 is damaged" in said
    straight = fresh()
    straight.steps(2)
    assert state.weights() == straight.weights() and state.moments() == straight.moments()
    assert state.stream.state() == straight.stream.state()


def test_where_all_are_damaged_the_run_starts_anew(tmp_path: Path, written: State) -> None:
    for path in checkpoint.checkpoints(tmp_path):
        remake(path, optimizer=lambda t: {})
    state, progress, said = go_on(tmp_path)
    assert progress is None and said.count("is damaged") == 2
    cold = fresh()
    assert (state.weights(), state.moments(), state.stream.state()) == (cold.weights(), {}, cold.stream.state())


def test_names_that_are_taken_do_not_stop_a_checkpoint_from_being_set_aside(tmp_path: Path, written: State) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step-000004.bad").write_text("a file")
    (folder / "step-000004.bad.2").symlink_to("nowhere")
    (folder / "step-000004" / "state.json").unlink()
    _, progress, said = go_on(tmp_path)
    assert progress.step == 2 and "set aside as step-000004.bad.3" in said
    assert (folder / "step-000004.bad").read_text() == "a file" and (folder / "step-000004.bad.3").is_dir()


def test_only_names_that_a_run_gives_are_looked_at(tmp_path: Path, written: State) -> None:
    for name in ("step-0000005", "step-5", "step-000006.bad", "step-00000x", ".step-000007.part", "step-" + "9" * 30):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000004"]


# ---- whose it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "identity",
    [IDENTITY | {"lora.r": 8}, {"seed": 3, "the data": ["0a" * 32]}, IDENTITY | {"lora.new": 1}],
    ids=["changed", "gone", "new"],
)
def test_a_checkpoint_of_another_run_is_refused_by_name_and_left_alone(
    tmp_path: Path, written: State, identity: dict[str, Any]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"lora\.(r|new): .* then, .* now\nPut these back.*resume = 'never'"):
        go_on(tmp_path, identity=identity)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_changes_a_result_is_in_the_identity_and_what_does_not_is_not() -> None:
    def of(cfg: Config) -> set[str]:
        return set(identity_of(cfg, {"the base model": "b"}, dict.fromkeys(cfg.data.train, "d")))

    split = {"train.batch_size", "train.gradient_accumulation_steps", "train.compile", "train.fused"}
    assert split <= of(Config(lora=LoRAConfig(dropout=0.1))) and not split & of(Config(lora=LoRAConfig(dropout=0.0)))
    assert not split & of(Config(method="full"))
    for key in (
        "seed",
        "method",
        "optim.learning_rate",
        "lora.r",
        "data.max_seq_len",
        "train.max_steps",
        "model.dtype",
    ):
        assert key in of(Config()), key
    assert not any(key.startswith("lora.") for key in of(Config(method="full")))
    for key in ("out", "eval.every_steps", "save.keep_last", "log.tensorboard", "train.resume", "model.path"):
        assert key not in of(Config(train=TrainConfig())), key


def test_only_a_checkpoint_of_this_run_and_step_is_fit_to_be_handed_over(tmp_path: Path, written: State) -> None:
    """All of these are whole: their manifests are right."""
    best, older = (tmp_path / "checkpoints" / f"step-{n:06d}" for n in (4, 2))
    assert unfit(best, written.model, IDENTITY) is None
    assert unfit(best, written.model, IDENTITY | {"seed": 4}) == "it is of another run"
    assert unfit(best, written.model[:1], IDENTITY).startswith("it trains other parameters")
    older.rename(tmp_path / "checkpoints" / "step-000003")
    assert unfit(older.with_name("step-000003"), written.model, IDENTITY) == "it says it is of step 2"


def test_progress_is_read_as_it_was_written() -> None:
    progress = Progress(9, 99, 2, 1, 8, 0.5, 8, 0, {"epoch": 1})
    assert Progress.read(json.loads(json.dumps(asdict(progress)))) == progress
    assert Progress.read(asdict(Progress())) == Progress()


# ---- half-made ------------------------------------------------------------------------------------------------------


def test_what_was_left_half_made_is_cleared_and_what_was_moved_put_back(tmp_path: Path) -> None:
    for name in (".a.part", ".b.old", ".c.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / ".run.json.77.part").write_text("{")
    (tmp_path / "c").mkdir()
    own = [".env.old", ".film.mkv.part", "kept"]
    for name in own:
        (tmp_path / name).write_text("")
    files.sweep(tmp_path, "[a-c]", "run.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["b", "c", *own])
    assert (tmp_path / "b" / "x").read_text() == ".b.old" and not list((tmp_path / "c").iterdir())
