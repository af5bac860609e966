"""A run's own state: saved whole, verified before it is used, resumed exactly.

    checkpoints/step-000100/
        trained.safetensors      the parameters that train
        optimizer.safetensors    moments, and the lower halves of fp32 masters
        state.json               step, data cursor, best evaluation so far, what the run is (its identity)
        manifest.json            size and sha256 of each file, written last

A checkpoint is a folder that appears by one rename, so it is there whole or not at all; neither safetensors nor
a file system notices a flipped bit, so the digests are checked before anything is used. Digests prove that the files
are those of their manifest and not that a run wrote them, so what they hold is checked against the model as well.
There is no pointer file: the newest valid checkpoint wins. No generator state is kept, since every random draw has a
seed of its own (`seeds.py`). When they are written and deleted: `saver.py`.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import files, optim, parallel, sharding
from minitune.config import Config
from minitune.data.stream import Stream
from minitune.errors import RunFailed, UserError
from minitune.progress import Progress

FILES = ("trained.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
MOST_JSON = 2**26  # bytes of manifest.json or state.json that are read
HARMLESS = (  # keys that may change between runs: they do not change what is learned, or other digests cover them
    "out",
    "model.path",
    "model.revision",
    "model.attention",
    "data.train",
    "data.eval",
    "data.cache",
    "data.category",
    "data.checks",
    "train.resume",
    "train.deterministic",
    "train.batch_size",  # the data cursor holds their product
    "train.gradient_accumulation_steps",
    "train.compile",
    "train.gradient_checkpointing",
    "train.offload",
    "train.fused",
    "model.dense_weights",
    "eval",
    "save",
    "log",
    "parallel",
)
DRAWS = (  # of these, the ones that decide which inputs an adapter drops: a mask is drawn for each micro-batch
    "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.compile",
    "train.fused",
)


class Damaged(Exception):
    """A checkpoint that cannot be used; the message says why, as in "it is damaged (...)"."""


# ---- what a run is -------------------------------------------------------------------------------------------------


def identity(cfg: Config, base: dict[str, str], digests: dict[str, str]) -> dict[str, Any]:
    """What must be the same for a run to go on: recipe keys that change the result, digests of base and data."""
    unused = ("lora",) if cfg.method == "full" else ()
    drops = cfg.method != "full" and cfg.lora.dropout > 0
    draws = set(DRAWS if drops else ())
    if cfg.train.batch_size == 1:  # each row is then a micro-batch, whichever rank it falls to
        draws.discard("train.gradient_accumulation_steps")
    harmless = {*HARMLESS, *unused} - draws
    recipe = {}
    for name, value in asdict(cfg).items():
        keys = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        recipe |= {key: v for key, v in keys.items() if not {key, name} & harmless}
    data = {
        what: [digests[name] for name in names]
        for what, names in (("the data", cfg.data.train), ("the evaluation data", cfg.data.eval))
    }
    things = {**recipe, **base, **data}
    return json.loads(json.dumps(things))  # as it will be read back


def check_identity(path: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError if what was saved at `path` is of another run, naming all that differs."""
    changed = [key for key in expected | saved if saved.get(key) != expected.get(key)]
    if changed:
        lines = [f"  {key}: {told(saved.get(key))} then, {told(expected.get(key))} now" for key in changed]
        draws = " Adapters with dropout draw it by micro-batch." if set(changed) & set(DRAWS) else ""
        raise UserError(
            f"{path} belongs to a run that differs from this one:\n"
            + "\n".join(lines)
            + "\nPut these back to go on with it, or choose another `out` (or train.resume = 'never') to start anew."
            + draws
        )


def told(value: Any) -> str:
    """A value for a message, long ones cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


# ---- saving --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A run's state after a step, in host memory, where training does not change it."""

    step: int
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # of state.json


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, run_is: dict[str, Any]
) -> Snapshot:
    """Copy what a checkpoint will hold. `run_is` is the run's identity."""
    tensors, numbers = optim.state(model, optimizer)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged moments are the host's memory too
    state = {"step": progress.step, "optimizer": numbers, "identity": run_is, "progress": asdict(progress)}
    return Snapshot(progress.step, copied(model, optim.trained_parameters(model)), copied(model, tensors), state)


@torch.no_grad()
def copied(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies in the host memory of the first process; on the others nothing stays."""
    wholes = sharding.wholes(model, tensors)
    return {name: tensor.to("cpu", copy=True) for name, tensor in wholes if parallel.is_first()}


def write(run: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint of a run and read it back from the disk; it appears when all of it is right.

    Raises:
        OSError: it could not be written, or what was read back is not what was written.
        Damaged: there are numbers in it that are not finite, and no run could go on from them.
    """
    check_numbers(snapshot.trained)
    check_numbers(snapshot.optimizer)
    path = run / "checkpoints" / name_of(snapshot.step)
    with files.new_folder(path) as part:
        manifest = {
            name: files.write_tensors(part / name, tensors)
            for name, tensors in zip(FILES[:2], (snapshot.trained, snapshot.optimizer), strict=True)
        }
        manifest["state.json"] = files.write_json(part / "state.json", snapshot.state)
        entries = {name: {"bytes": (part / name).stat().st_size, "sha256": sum_} for name, sum_ in manifest.items()}
        files.write_json(part / MANIFEST, entries)
        for name in (*FILES, MANIFEST):
            files.forget(part / name)
        if (damage := damaged(part)) is not None:
            raise OSError(errno.EIO, f"read back, {damage}", str(path))
    return path


# ---- verifying and loading -----------------------------------------------------------------------------------------


def resume(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Stream,
    expected: dict[str, Any],
    say: Callable[[str], None],
) -> Progress | None:
    """Put the newest valid checkpoint of a run back into model, optimizer and data stream; how far it had come, or
    None if there is none. A damaged one is set aside by name and the one before taken.

    Raises:
        UserError: the checkpoint belongs to a run whose identity differs from `expected`.
    """
    progress: Progress | None = None

    def newest() -> str | None:
        nonlocal progress
        for path in reversed(checkpoints(run)):
            try:
                progress = load(path, model, optimizer, stream, expected)
            except (Damaged, RecursionError) as damage:  # JSON that somebody has nested too deeply
                aside = set_aside(path)
                say(f"checkpoint {path.name} is damaged ({damage}); set aside as {aside.name}")
            else:
                say(f"going on from {path.name}")
                return path.name
        return None

    found = parallel.of_first(newest)
    if found is not None and progress is None:  # the first process has found it
        try:
            progress = load(run / "checkpoints" / found, model, optimizer, stream, expected)
        except Damaged as damage:
            raise RunFailed(f"{found} is whole to the first process, and to this one damaged ({damage})") from None
    return progress


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, stream: Stream, expected: dict[str, Any]
) -> Progress:
    """Put a checkpoint back into model, optimizer and data stream; if it is no good (Damaged) into none of them."""
    if (damage := damaged(path)) is not None:
        raise Damaged(damage)
    state = read_state(path)
    check_identity(path, state["identity"], expected)
    try:
        progress = Progress.read(state["progress"])
    except ValueError as error:
        raise Damaged(str(error)) from None
    if not state["step"] == progress.step == step_of(path):
        raise Damaged(f"it says it is of step {told(state['step'])}")
    if progress.stream != stream.state_at(progress.step):
        raise Damaged("its place in the data is not that of its step")
    trained = read_trained(path, model)
    moments, numbers = own(model, read_tensors(path / "optimizer.safetensors")), state["optimizer"]
    check_numbers(moments)
    counted = {progress.applied} if progress.applied else optim.updates(moments, numbers) & {0}
    if optim.updates(moments, numbers) != counted:
        raise Damaged(f"its optimizer state is not that of {progress.applied} updates")
    try:
        optim.load_state(model, optimizer, moments, numbers)
    except ValueError as error:
        raise Damaged(str(error)) from None
    put(trained, model)
    stream.load(progress.stream)
    return progress


def load_trained(path: Path, model: nn.Module) -> None:
    """Only the trained parameters of a checkpoint, e.g. of the best one at the end of a run. Raises Damaged."""
    if (damage := damaged(path)) is not None:
        raise Damaged(damage)
    put(read_trained(path, model), model)


def unfit(path: Path, model: nn.Module, run_is: dict[str, Any]) -> str | None:
    """Why the trained parameters of a checkpoint are not those of this run at its step, or None."""
    if (damage := damaged(path)) is not None:
        return damage
    state = read_state(path)
    if state["identity"] != run_is:
        return "it is of another run"
    if state["step"] != step_of(path):
        return f"it says it is of step {told(state['step'])}"
    try:
        read_trained(path, model)
    except Damaged as damage:
        return str(damage)
    return None


def read_trained(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, which fit the model."""
    saved = own(model, read_tensors(path / "trained.safetensors"))
    trained = optim.trained_parameters(model)
    if saved.keys() != trained.keys():
        raise Damaged(f"it trains other parameters: {', '.join(sorted(saved.keys() ^ trained.keys())[:5])}")
    for name, parameter in trained.items():
        if optim.kind_of(saved[name]) != optim.kind_of(parameter):
            raise Damaged(f"{name} is {saved[name].dtype} {tuple(saved[name].shape)} in it")
    check_numbers(saved)
    return saved


@torch.no_grad()
def put(saved: dict[str, Tensor], model: nn.Module) -> None:
    for name, parameter in optim.trained_parameters(model).items():
        parameter.copy_(saved[name])


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: that each is there and is what its manifest says."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            return "it is no folder"
        manifest = read_small(path / MANIFEST)
        if manifest.keys() != set(FILES):
            return "its manifest does not list just its files"
        for name in FILES:
            file, facts = path / name, manifest[name]
            if not files.is_plain(file):
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or files.sha256(file) != facts["sha256"]:
                return f"{name} is not what was written"
        state = read_small(path / "state.json")
        if not isinstance(state.get("identity"), dict) or not is_numbers(state.get("optimizer")):
            return "state.json does not hold a run's state"
        if not {"step", "progress"} <= state.keys():
            return "state.json does not hold a run's state"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its files cannot be read: {type(error).__name__}"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that is not damaged."""
    return read_small(path / "state.json")


def read_small(path: Path) -> dict[str, Any]:
    """A JSON object. Raises OSError or ValueError."""
    try:
        value = json.loads(files.read_plain(path, MOST_JSON))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no object")
    return value


def is_numbers(value: Any) -> bool:
    """Whether it is a table of whole numbers, as optimizers keep beside their tensors."""
    return isinstance(value, dict) and all(type(x) is int and 0 <= x < 2**53 for x in value.values())


def own(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that are spread over ranks, the rows that are here."""
    try:
        return sharding.parts(model, tensors)
    except ValueError as error:
        raise Damaged(str(error)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from None


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raise Damaged if a number is not finite, or below zero where squares are kept.

    By numpy, in one thread: the others are at work for the training that goes on meanwhile.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        flat = tensor.reshape(-1)
        positive = name.rpartition(".")[2] in optim.NEVER_NEGATIVE
        for start in range(0, len(flat), files.PIECE):
            piece = flat[start : start + files.PIECE]
            if piece.dtype == torch.bfloat16:  # which numpy does not know: all bits of the exponent set
                fine = ((piece.view(torch.int16).numpy() & 0x7F80) != 0x7F80).all()
            else:
                fine = np.isfinite(piece.numpy()).all() and not (positive and (piece.numpy() < 0).any())
            if not fine:
                raise Damaged(f"{name} holds numbers that cannot be")


# ---- the folders ---------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, valid or not."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,15}", path.name)]
    return sorted((path for path in found if path.name == name_of(step_of(path))), key=step_of)


def name_of(step: int | None) -> str:
    return "" if step is None else f"step-{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is no good, so that it is in nobody's way and not lost."""
    number, aside = 1, path.with_name(f"{path.name}.bad")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.bad.{number}")
    os.rename(path, aside)
    files.sync(path.parent)
    return aside
