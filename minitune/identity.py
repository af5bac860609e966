"""What a run is: all that must be the same for it to go on from what it has left.

Written down, an identity holds no secret. Beside a value that would have shown one stands its seal, by which the value
is known again whatever counts as a secret by then.
"""

import hashlib
import hmac
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitune import secrets
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

SEALS = "sealed"  # of an identity that is written down: key -> seal of the value that was hidden
ROUNDS = 100_000  # of a seal: what is hidden may be a password, short enough to be guessed


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


def written(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as it is written down: without secrets, and with the seals of the values that held them."""
    clean = {key: secrets.hidden_in(value) for key, value in identity.items()}
    seals = {key: seal(value) for key, value in identity.items() if clean[key] != value}
    return clean | ({SEALS: seals} if seals else {})


def seal(value: Any, salt: str | None = None) -> str:
    """What tells a value from others, and does not tell the value."""
    salt = salt or os.urandom(16).hex()
    digest = hashlib.pbkdf2_hmac("sha256", json.dumps(value, sort_keys=True).encode(), salt.encode(), ROUNDS)
    return f"{salt}:{digest.hex()}"


def differing(saved: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The keys in which an identity that was written down is not the expected one."""
    seals = saved.get(SEALS)
    seals = seals if isinstance(seals, dict) else {}

    def same(key: str) -> bool:
        value = expected.get(key)
        if isinstance(sealed := seals.get(key), str):
            return hmac.compare_digest(sealed.encode(), seal(value, sealed.partition(":")[0]).encode())
        return saved.get(key) in (value, secrets.hidden_in(value))  # hidden, unsealed: of an older program

    return [key for key in expected | saved if key != SEALS and not same(key)]


def check_identity(path: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError if what was saved at `path` is of another run, naming all that differs."""
    if changed := differing(saved, expected):
        lines = [f"  {key}: {change(saved.get(key), expected.get(key))}" for key in changed]
        draws = " Adapters with dropout draw it by micro-batch." if set(changed) & set(DRAWS) else ""
        raise UserError(
            f"{path} belongs to a run that differs from this one:\n"
            + "\n".join(lines)
            + "\nPut these back to go on with it, or choose another `out` (or train.resume = 'never') to start anew."
            + draws
        )


def change(then: Any, now: Any) -> str:
    """What was and what is, as far as it may be told."""
    before, after = told(then), told(now)
    return f"{before} then, {after} now" if before != after else f"{before} then, and something else of that form now"


def told(value: Any) -> str:
    """A value for a message, long ones cut."""
    return secrets.shortened(json.dumps(value, ensure_ascii=False), 100)
