"""A run folder, as those open it who come after: the next start of the same run, a merge, generation.

run.json makes a folder a run's. It is the first that a run writes there, before it has trained anything, so whatever
moment a run is cut at, either it stands there or nothing does but hidden files half-made; where it was lost since, a
checkpoint tells as much. Files under a run's names with neither beside them are somebody's own, and left alone.
"""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitune import adapters, checkpoint, files, lock, parallel, pretrained
from minitune.config import Config, load_config
from minitune.errors import UserError
from minitune.identity import check_identity
from minitune.log import say
from minitune.progress import Progress

MADE = ("adapter", "model")  # the folders that a run hands over
NOTES = ("config.toml", "run.json", "metrics.jsonl", "left_out.jsonl")  # the files beside them that it writes whole
NAMES = (*NOTES, *MADE, "checkpoints", "tensorboard")  # all that it writes, its lock aside
HOW_TO_TRAIN = (
    "model.attention=auto",
    "model.dense_weights=never",
    "train.gradient_checkpointing=none",
    "train.offload=never",
    "train.fused=none",
    "train.compile=none",
)


def open_run(run: Path) -> tuple[Config, Path]:
    """The recipe of a finished run, with whatever says only how to train at its plainest and [lora] as what it handed
    over, and the folder of its base.

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
    return replace(cfg, lora=adapters.exported(cfg.lora)), base


def finished(run: Path) -> dict[str, Any] | None:
    """run.json of a run that came to its end and still holds what it made, or None."""
    if not (run / "run.json").exists():
        return None
    try:
        facts = files.read_json(run / "run.json")
    except UserError as error:
        say(f"{error}; taking the run as not finished")
        return None
    if facts.get("finished") is not True:
        return None
    if (fault := what_is_missing(run, facts)) is not None:
        say(f"{run} had finished, but {fault}; taking it as not finished")
        return None
    return facts


def what_is_missing(run: Path, facts: dict[str, Any]) -> str | None:
    """What run.json promises of a finished run and is not there, or not as the run made it."""
    made = facts.get("made")
    kinds = {"identity": dict, "made": dict, "step": int, "finish_reason": str}
    if not made or not all(isinstance(facts.get(key), kind) for key, kind in kinds.items()):
        return "its run.json does not say what it did and made"
    for name, known in made.items():
        file = run / name
        if name.split("/")[0] not in MADE or ".." in name or not files.is_plain(file):
            return f"{name} is missing"
        if not is_as(known, file):
            return f"{name} has changed"
    return None


def is_as(known: Any, file: Path) -> bool:
    """Whether a file is what run.json knows of it. Of another size, it is not read: it may be any size."""
    return isinstance(known, dict) and known.get("bytes") == file.stat().st_size and known == facts_of(file)


def made(run: Path) -> dict[str, dict[str, Any]]:
    """What a run hands over: size and sha256 of each file, for run.json."""
    found = (path for folder in MADE for path in sorted((run / folder).rglob("*")) if files.is_plain(path))
    return {path.relative_to(run).as_posix(): facts_of(path) for path in found}


def facts_of(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": files.sha256(file)}


def note(run: Path, facts: dict[str, Any], progress: Progress, reason: str) -> dict[str, Any]:
    """Write run.json: what is known of the run, how far it came, and how it ended; returns all of it."""
    how_far = {"step": progress.step, "tokens": progress.tokens, "skipped_steps": progress.skipped}
    best = {"best_step": progress.best_step, "best_eval_loss": progress.best_loss}
    whole = {**facts, **how_far, **best, "finish_reason": reason}
    if parallel.is_first():
        lock.must_be_there(run)
        files.write_json(run / "run.json", whole)
    return whole


def noted(run: Path) -> dict[str, Any] | None:
    """run.json of a run, however far it came; None where there is none that can be read."""
    try:
        facts = files.read_json(run / "run.json")
    except UserError:
        return None
    return facts if isinstance(facts.get("identity"), dict) else None


def is_run(run: Path) -> bool:
    """Whether a folder is a run's, however far it came."""
    return bool(checkpoint.checkpoints(run)) or noted(run) is not None


def refuse_another(run: Path, identity: dict[str, Any]) -> None:
    """Raise UserError if the folder is of a run with another identity, whatever else of it is left."""
    facts = noted(run)
    if facts is not None and facts["identity"]:
        check_identity(run / "run.json", facts["identity"], identity)


def keep_changed(run: Path) -> None:
    """Set aside what stands where a run hands over, and is not what a run of this folder has made: somebody has
    edited it, or put something beside it. What a run that was cut had handed over is made again, the same."""
    facts = noted(run)
    if facts is not None and facts.get("finished") is not True:
        return
    known = facts.get("made") if facts else None
    known = known if isinstance(known, dict) else {}
    for folder in (run / name for name in MADE if os.path.lexists(run / name)):
        if (other := first_unknown(run, folder, known)) is not None:
            aside = files.set_aside(folder, "kept")
            say(f"{other} is not as the run made it; {folder.name} is set aside as {aside}, and made anew")


def first_unknown(run: Path, folder: Path, known: dict[str, Any]) -> Path | None:
    """A file of a folder that run.json does not know as it is; the folder itself if it is none."""
    if not folder.is_dir():
        return folder
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return next(
        (p for p in found if not (files.is_plain(p) and is_as(known.get(p.relative_to(run).as_posix()), p))), None
    )


def refuse_others(run: Path) -> None:
    """Raise UserError if a folder that is no run's holds what a run would write over."""
    taken = [str(run / name) for name in NAMES if os.path.lexists(run / name)]
    if taken and not is_run(run):
        raise UserError(
            f"{', '.join(taken)} {'is' if len(taken) == 1 else 'are'} in the way: {run} holds no run of minitune's (no "
            "run.json of one, no checkpoint), and one would write over that; choose another `out`, or move it elsewhere"
        )


def set_aside(run: Path) -> None:
    """Make room for a new run without losing what an old one left."""
    names = {path.name for path in run.iterdir()} if run.exists() else set()
    if not {name for name in names if not name.startswith(".")} - {lock.NAME}:
        return
    if not is_run(run):
        raise UserError(f"out: {run} is not empty and no run; choose another folder")
    with lock.hold(run):  # nobody is in it
        number = next(n for n in itertools.count(1) if not run.with_name(f"{run.name}.{n}").exists())
        run.rename(run.with_name(f"{run.name}.{number}"))
    say(f"train.resume = 'never': what was in {run} is now in {run}.{number}")
