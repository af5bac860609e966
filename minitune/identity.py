"""What a run is: all that must be the same for it to go on from what it has left."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
DRAWS = (  # of these, the ones that decide which inputs an adapter drops: a mask is drawn for each micro-batch
    "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.compile",
    "train.fused",
)


def identity_of(cfg: Config, base: dict[str, str], digests: dict[str, str]) -> dict[str, Any]:
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
