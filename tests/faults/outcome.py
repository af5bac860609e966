"""What a run came to, and which of its checkpoints are whole: read here without minitune's own code."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from forked import Lost
from safetensors import SafetensorError, safe_open

COMPARED = ("step", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss", "skipped")
HANDED_OVER = ("adapter/adapter_model.safetensors", "model/model.safetensors")


@dataclass(frozen=True)
class Outcome:
    """All of a run that must be the same bit for bit, however often it was interrupted."""

    metrics: tuple[tuple, ...]  # each line of metrics.jsonl, without what the clock says
    weights: str  # sha256 of the file that is handed over


def outcome(run: Path) -> Outcome:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = tuple(tuple((key, line[key]) for key in COMPARED if key in line) for line in lines)
    [weights] = [run / name for name in HANDED_OVER if (run / name).exists()]
    return Outcome(metrics, sha256(weights))


def must_equal(run: Path, straight: Outcome) -> None:
    """Raise Lost unless the run has come to just what the straight one did."""
    try:
        found = outcome(run)
    except (OSError, ValueError) as error:
        raise Lost(f"the run left no whole result: {error}") from None
    if found.metrics != straight.metrics:
        differing = [line for line, other in zip(found.metrics, straight.metrics, strict=False) if line != other]
        raise Lost(
            f"{len(found.metrics)} lines of metrics for {len(straight.metrics)}, the first that differs: "
            f"{differing[:1] or 'the last'}"
        )
    if found.weights != straight.weights:
        raise Lost("the weights that were handed over differ")


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 if none."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in lines), default=0)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, valid or not."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def valid(run: Path) -> list[int]:
    """The steps of the checkpoints that are whole, oldest first."""
    return [int(path.name[5:]) for path in checkpoints(run) if whole(path)]


def whole(checkpoint: Path) -> bool:
    """Whether all that the manifest lists is there with its size and digest, and the tensor files open."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, facts in manifest.items():
            file = checkpoint / name
            if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
                return False
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
        return {"trained.safetensors", "optimizer.safetensors", "state.json"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(run: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder: its digest and when it was written; folders and links by name alone."""
    found = {}
    for path in sorted(run.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(run))] = (sha256(path), path.stat().st_mtime_ns) if plain else ("", 0)
    return found
