"""A run folder, as those open it who come after: the next start of the same run, a merge, generation."""

import itertools
from pathlib import Path
from typing import Any

from minitune import files, pretrained
from minitune.config import Config, load_config
from minitune.errors import UserError
from minitune.log import say

HOW_TO_TRAIN = (
    "model.attention=auto",
    "model.dense_weights=never",
    "train.gradient_checkpointing=none",
    "train.offload=never",
    "train.fused=none",
    "train.compile=none",
)


def open_run(run: Path) -> tuple[Config, Path]:
    """The recipe of a finished run, with whatever says only how to train at its plainest, and the folder of its base.

    Raises:
        UserError: no run, one that has not finished, or a base that is not the one it was trained on any more.
    """
    if not (run / "config.toml").exists():
        raise UserError(f"{run} is no run folder: it has no config.toml")
    cfg = load_config([str((run / "config.toml").absolute()), *HOW_TO_TRAIN])
    facts = finished(run)
    if facts is None:
        raise UserError(f"{run} has not finished; run it again to go on, and then come back")
    base = pretrained.find(cfg.model.path, cfg.model.revision)
    for what, digest in pretrained.fingerprint(base).items():
        if facts["identity"].get(what) != digest:
            raise UserError(f"{what} in {base} is not the one that {run} was trained on; its files have changed")
    return cfg, base


def finished(run: Path) -> dict[str, Any] | None:
    """run.json of a run that came to its end and still holds what it made, or None."""
    path = run / "run.json"
    try:
        facts = files.read_json(path) if path.exists() else {}
    except UserError as error:
        say(f"{error}; taking the run as not finished")
        return None
    made = (run / "adapter").is_dir() or (run / "model").is_dir()
    return facts if made and facts.get("finished") and "identity" in facts else None


def set_aside(run: Path) -> None:
    """Make room for a new run without losing what an old one left."""
    if not run.exists() or not any(run.iterdir()):
        return
    if not (run / "config.toml").exists():
        raise UserError(f"out: {run} is not empty and no run; choose another folder")
    number = next(n for n in itertools.count(1) if not run.with_name(f"{run.name}.{n}").exists())
    run.rename(run.with_name(f"{run.name}.{number}"))
    say(f"train.resume = 'never': what was in {run} is now in {run}.{number}")
