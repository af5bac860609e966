"""A run's own state: saved whole, verified before it is used, resumed exactly, rotated.

    checkpoints/step-000100/
        trained.safetensors      the parameters that train
        optimizer.safetensors    moments, and the lower halves of fp32 masters
        state.json               step, data cursor, best evaluation so far, what the run is (its identity)
        manifest.json            size and sha256 of each file, written last

A checkpoint is a folder that appears by one rename, so it is there whole or not at all; neither safetensors nor
a file system notices a flipped bit, so the digests are checked before anything is used. There is no pointer
file: the newest valid checkpoint wins. No generator state is kept, since every random draw has a seed of its own
(`seeds.py`).
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from minitune import files, optim
from minitune.config import Config
from minitune.errors import UserError

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


def identity(cfg: Config, base: dict[str, str], digests: dict[str, str]) -> dict[str, Any]:
    """What must be the same for a run to go on: recipe keys that change the result, digests of base and data."""
    unused = ("lora",) if cfg.method == "full" else ()
    recipe = {}
    for name, value in asdict(cfg).items():
        keys = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        recipe |= {key: v for key, v in keys.items() if not {key, name} & {*HARMLESS, *unused}}
    data = {
        what: [digests[name] for name in names]
        for what, names in (("the data", cfg.data.train), ("the evaluation data", cfg.data.eval))
    }
    things = {**recipe, **base, **data}
    return json.loads(json.dumps(things))  # as it will be read back


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write checkpoint `step` of a run. `state` is what the loop needs to go on, as JSON."""
    tensors, numbers = optim.state(model, optimizer)
    with files.new_folder(run / "checkpoints" / name_of(step)) as part:
        files.write_tensors(part / "trained.safetensors", optim.trained_parameters(model))
        files.write_tensors(part / "optimizer.safetensors", tensors)
        files.write_json(part / "state.json", {"step": step, "optimizer": numbers, **state})
        manifest = {
            path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in sorted(part.iterdir())
        }
        files.write_json(part / "manifest.json", manifest)


def newest(run: Path, expected: dict[str, Any], say: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint of a run, or None. A damaged one is set aside by name and the one before taken.

    Raises:
        UserError: the checkpoint belongs to a run whose identity differs from `expected`.
    """
    for leftover in (run / "checkpoints").glob(".*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(checkpoints(run)):
        damage = damaged(path)
        if damage is None:
            check_identity(path, read_state(path)["identity"], expected)
            return path
        aside = path.with_name(path.name + ".bad")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        say(f"checkpoint {path.name} is damaged ({damage}); set aside as {aside.name}")
    return None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, valid or not."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, facts in manifest.items():
            file = path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or files.sha256(file) != facts["sha256"]:
                return f"{name} is not what was written"
        if not {"trained.safetensors", "optimizer.safetensors", "state.json"} <= manifest.keys():
            return "its manifest is incomplete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    return None


def check_identity(path: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    changed = [key for key in expected | saved if saved.get(key) != expected.get(key)]
    if changed:
        lines = [f"  {key}: {saved.get(key)!r} then, {expected.get(key)!r} now" for key in changed]
        raise UserError(
            f"{path} belongs to a run that differs from this one:\n"
            + "\n".join(lines)
            + "\nPut these back to go on with it, or choose another `out` (or train.resume = 'never') to start anew."
        )


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a verified checkpoint back into model and optimizer; returns its state."""
    load_trained(path, model)
    state = read_state(path)
    optim.load_state(model, optimizer, load_file(path / "optimizer.safetensors"), state["optimizer"])
    return state


@torch.no_grad()
def load_trained(path: Path, model: nn.Module) -> None:
    """Only the trained parameters of a checkpoint, e.g. of the best one at the end of a run."""
    saved = load_file(path / "trained.safetensors")
    trained = optim.trained_parameters(model)
    if saved.keys() != trained.keys():
        raise UserError(f"{path} trains other parameters: {', '.join(sorted(saved.keys() ^ trained.keys())[:5])}")
    for name, parameter in trained.items():
        parameter.copy_(saved[name])


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def rotate(run: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best, also that of each kept one, to which a run may
    have to go back. Call it when a new one has been written."""
    every = checkpoints(run)
    old, kept = every[:-keep_last], every[-keep_last:]
    best = {best_step, *(read_state(path)["progress"]["best_step"] for path in kept if damaged(path) is None)}
    for path in old:
        if path.name not in map(name_of, best):
            shutil.rmtree(path)


def name_of(step: int | None) -> str:
    return "" if step is None else f"step-{step:06d}"
