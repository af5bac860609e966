"""Which modules of a model are adapted, with which rank and alpha.

Keys and rules are PEFT's (its LoraConfig), so that an adapter folder means the same in both. What PEFT passes over, a
name or a pattern that matches nothing, is refused: it would train something else than was asked for.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from minitune.config import LINEARS, LoRAConfig
from minitune.errors import UserError

SECONDS = 3  # in which all expressions must have met all names
MATCH = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
patterns, names = json.load(sys.stdin)
try:
    json.dump([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns], sys.stdout)
except (re.error, RecursionError, OverflowError, MemoryError):
    sys.exit(3)
"""


def choose(model: nn.Module, cfg: LoRAConfig) -> dict[str, LoRAConfig]:
    """Full name of each module that gets an adapter -> `cfg` with the rank and alpha of that one.

    Raises:
        UserError: a name or pattern that matches nothing, or what cannot be adapted; the message begins with the key.
    """
    modules = dict(model.named_modules())
    del modules[""]
    names = list(modules)
    for key in ("modules_to_save", "trainable_token_indices"):
        if getattr(cfg, key):
            raise UserError(f"lora.{key}: not trained yet beside adapters; leave it out, or set method = 'full'")
    found = matched(cfg, names)

    asked = targets(cfg, names, found)
    adapted = [name for name in asked if name not in excluded(cfg, names, found)]
    for name in adapted:
        if not hasattr(modules[name], "in_features"):
            raise UserError(f"lora.target_modules: {name} is a {type(modules[name]).__name__}, and no linear")
    if not adapted:
        raise UserError("lora.target_modules: nothing is left to adapt; all that it names is excluded")

    ranks = {name: first(cfg.rank_pattern, name, found, "rank_pattern", cfg.r) for name in adapted}
    alphas = {name: first(cfg.alpha_pattern, name, found, "alpha_pattern", cfg.alpha) for name in adapted}
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(cfg, key):
            if not found[ending(pattern)] & set(adapted):
                raise UserError(f"lora.{key}: no adapted module's name ends in {pattern[:200]!r}")
    return {name: replace(cfg, r=ranks[name], alpha=alphas[name]) for name in adapted}


def targets(cfg: LoRAConfig, names: list[str], found: dict[str, set[str]]) -> list[str]:
    """The names that cfg.target_modules asks for, before anything is excluded."""
    said = cfg.target_modules
    if said == "all-linear":
        said = LINEARS
    if isinstance(said, str):
        if not found[said]:
            raise UserError(
                f"lora.target_modules: no module's whole name matches {said[:200]!r}; "
                "an expression must match all of a name like model.layers.0.self_attn.q_proj"
            )
        return [name for name in names if name in found[said]]
    missing = [target for target in said if not any(ends(name, (target,)) for name in names)]
    if missing:
        raise UserError(f"lora.target_modules: no module of this model is named {', '.join(missing)}")
    layers = set(cfg.layers_to_transform)
    count = len({layer_of(name) for name in names} - {None})
    if beyond := sorted(layer for layer in layers if layer >= count):
        raise UserError(f"lora.layers_to_transform: there is no layer {beyond[0]}; the model has {count}, from 0 on")
    return [name for name in names if name in said or (ends(name, said) and (not layers or layer_of(name) in layers))]


def excluded(cfg: LoRAConfig, names: list[str], found: dict[str, set[str]]) -> set[str]:
    said = cfg.exclude_modules
    if not said:
        return set()
    out = found[said] if isinstance(said, str) else {name for name in names if ends(name, said)}
    nothing = [] if isinstance(said, str) else [each for each in said if not any(ends(name, (each,)) for name in names)]
    if not out or nothing:
        raise UserError(f"lora.exclude_modules: no module's name matches {', '.join(nothing) or said!r}")
    return out


def first(pattern: dict[str, float], name: str, found: dict[str, set[str]], key: str, otherwise: float) -> float:
    """The value of the first key that matches the end of a name. PEFT sorts the keys when it saves an adapter, so they
    must give the same in that order."""
    given, ordered = (
        next((pattern[each] for each in keys if name in found[ending(each)]), otherwise)
        for keys in (list(pattern), sorted(pattern))
    )
    if given != ordered:
        raise UserError(
            f"lora.{key}: two keys match {name}, and which one holds depends on their order, which PEFT does not keep; "
            "write them so that one of them matches, or so that the first is the first in the alphabet"
        )
    return given


def ends(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a name is one of these, or ends in one after a dot."""
    return name in parts or name.endswith(tuple(f".{part}" for part in parts))


def layer_of(name: str) -> int | None:
    """The first number in a name that has something behind it, as PEFT counts layers."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found[1]) if found else None


def ending(pattern: str) -> str:
    """The expression for whole names that end in `pattern`."""
    return rf"(.*\.)?({pattern})"


# ---- expressions ---------------------------------------------------------------------------------------------------


def matched(cfg: LoRAConfig, names: list[str]) -> dict[str, set[str]]:
    """Expression -> the names that it matches whole, for every expression of `cfg`."""
    patterns = [ending(key) for key in (*cfg.rank_pattern, *cfg.alpha_pattern)]
    patterns += [each for each in (cfg.target_modules, cfg.exclude_modules) if isinstance(each, str) and each]
    return matches(patterns, names)


def matches(patterns: Iterable[str], names: list[str]) -> dict[str, set[str]]:
    """Plain names with dots are matched at once, all else in a process of its own: some expressions take longer than
    anyone can wait, and an adapter folder may bring one."""
    patterns = sorted(set(patterns))
    plain = [each for each in patterns if re.fullmatch(r"(\(\.\*\\\.\)\?\()?[\w.\-]*\)?", each)]
    found = {each: {name for name in names if re.fullmatch(each, name)} for each in plain if compiles(each)}
    if wild := [each for each in patterns if each not in found]:
        shown = ", ".join(each.removeprefix(r"(.*\.)?")[:200] for each in wild)
        try:
            asked = json.dumps([wild, names])
            apart = [sys.executable, "-I", "-S", "-c", MATCH]
            done = subprocess.run(apart, input=asked, capture_output=True, text=True, timeout=SECONDS, check=False)
            answer = json.loads(done.stdout) if done.returncode == 0 else None
        except subprocess.TimeoutExpired:
            raise UserError(f"lora: no expression of these may take over {SECONDS} seconds to match: {shown}") from None
        if answer is None:
            raise UserError(f"lora: one of these is no regular expression: {shown}")
        found |= {each: set(hits) for each, hits in zip(wild, answer, strict=True)}
    return found


def compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False
