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
seed of its own (`seeds.py`). When they are written and deleted: `saver.py`. Going on from one: `resume.py`.
"""

import errno
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import files, foreign, optim, parallel, sharding
from minitune.errors import UserError
from minitune.progress import Progress

FILES = ("trained.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
MOST_JSON = 2**26  # bytes of manifest.json or state.json that are read


class Damaged(Exception):
    """A checkpoint that cannot be used; the message says why, as in "it is damaged (...)"."""


# ---- writing -------------------------------------------------------------------------------------------------------


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


# ---- verifying -----------------------------------------------------------------------------------------------------


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
        value = foreign.parse_json(files.read_plain(path, MOST_JSON), str(path))
    except UserError as error:  # to a checkpoint it is damage
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no object")
    return value


def is_numbers(value: Any) -> bool:
    """Whether it is a table of whole numbers, as optimizers keep beside their tensors."""
    return isinstance(value, dict) and all(type(x) is int and 0 <= x < 2**53 for x in value.values())


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
    return files.set_aside(path, "bad")
