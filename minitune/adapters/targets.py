"""Which modules of a model are adapted, with which rank and alpha; which train whole, and of which a few rows.

Keys and rules are PEFT's (its LoraConfig), so that an adapter folder means the same in both. What PEFT passes over, a
name or a pattern that matches nothing, is refused: it would train something else than was asked for.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from minitune.config import ENDS, LINEARS, LoRAConfig
from minitune.errors import UserError
from minitune.secrets import shortened

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


@dataclass(frozen=True)
class Chosen:
    """Modules by their full names."""

    adapted: dict[str, LoRAConfig]  # each with the rank and alpha of its own adapter
    whole: tuple[str, ...]  # that train as they are
    rows: dict[str, tuple[int, ...]]  # the tokens whose rows train


def choose(model: nn.Module, cfg: LoRAConfig) -> Chosen:
    """What `cfg` asks for on this model.

    Raises:
        UserError: a name or pattern that matches nothing, or what cannot be adapted; the message begins with the key.
    """
    modules, tied = dict(model.named_modules()), model.config.tie_word_embeddings
    del modules[""]
    names = list(modules)
    found = matched(cfg, names)

    whole, rows = kept_whole(modules, cfg, tied), token_rows(modules, cfg, tied)
    if twice := [name for name in whole if name in rows]:  # a tied pair, or an end of a name that the recipe hides
        raise UserError(
            f"lora.modules_to_save: {', '.join(twice)} would train whole, its rows with it; leave it out of "
            "there or of trainable_token_indices"
        )
    asked = targets(cfg, names, found)
    adapted = [name for name in asked if name not in excluded(cfg, names, found) | within(cfg, names)]
    for name in adapted:
        if name in whole or name in rows:
            raise UserError(f"lora.target_modules: {name} is adapted and trains in another way too; leave it out")
        if tied and name.endswith(ENDS):
            raise UserError(
                "lora.target_modules: this model's lm_head is tied to its embedding, and neither can be adapted alone; "
                f"leave {name} out"
            )
        if isinstance(modules[name], nn.Embedding) and cfg.variant != "lora":
            raise UserError(f"lora.target_modules: {cfg.variant} has no form for an embedding; leave {name} out")
        if not hasattr(modules[name], "in_features") and not isinstance(modules[name], nn.Embedding):
            raise UserError(f"lora.target_modules: {name} is a {type(modules[name]).__name__}, and no linear")
    if not adapted:
        raise UserError("lora.target_modules: nothing is left to adapt; all that it names is excluded or saved whole")

    ranks = {name: first(cfg.rank_pattern, name, found, "rank_pattern", cfg.r) for name in adapted}
    alphas = {name: first(cfg.alpha_pattern, name, found, "alpha_pattern", cfg.alpha) for name in adapted}
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(cfg, key):
            if not found[ending(pattern)] & set(adapted):
                raise UserError(f"lora.{key}: no adapted module's name ends in {shortened(pattern, 200)!r}")
    return Chosen({name: replace(cfg, r=ranks[name], alpha=alphas[name]) for name in adapted}, whole, rows)


def kept_whole(modules: dict[str, nn.Module], cfg: LoRAConfig, tied: bool) -> tuple[str, ...]:
    """The modules whose names end in one of cfg.modules_to_save; a tied pair goes together, the embedding first."""
    for said in cfg.modules_to_save:
        if not re.fullmatch(r"[\w.]+", said) or not any(name.endswith(said) for name in modules):
            raise UserError(f"lora.modules_to_save: no module's name ends in {shortened(said, 200)!r}")
    whole = [name for name in modules if cfg.modules_to_save and name.endswith(cfg.modules_to_save)]
    for name in whole:
        if list(modules[name].children()) or type(getattr(modules[name], "weight", None)) is not nn.Parameter:
            kind = type(modules[name]).__name__
            why = "a four-bit one cannot train; set method = 'lora'" if kind == "NF4Linear" else "it has no weight"
            raise UserError(f"lora.modules_to_save: {name} is a {kind}, and {why}")
        if getattr(modules[name], "bias", None) is not None:
            raise UserError(f"lora.modules_to_save: {name} has a bias, which is not merged; leave it out")
    if tied and any(name.endswith(ENDS) for name in whole):
        pair = [next(name for name in modules if name.endswith(end)) for end in ENDS]
        whole = [*pair, *(name for name in whole if name not in pair)]
    return tuple(whole)


def token_rows(modules: dict[str, nn.Module], cfg: LoRAConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    """Embedding or head -> the tokens whose rows train; of a tied pair both, the embedding first."""
    said = cfg.trainable_token_indices
    said = said if isinstance(said, dict) else {"embed_tokens": said} if said else {}
    rows = {}
    for end, tokens in said.items():
        name = next((name for name in modules if end and name.endswith(end)), "")
        if not name.endswith(ENDS) or not tokens:
            raise UserError(f"lora.trainable_token_indices: {end!r} must be embed_tokens or lm_head, with some tokens")
        V = len(modules[name].weight)
        if max(tokens) >= V:
            raise UserError(
                f"lora.trainable_token_indices: the model has rows for the tokens 0 to {V - 1}, and none for "
                f"{max(tokens)}; give its embedding and head more rows first (transformers' resize_token_embeddings)"
            )
        rows[name] = tuple(tokens)
    if tied and rows:
        if len(set(rows.values())) > 1 or not any(name.endswith("embed_tokens") for name in rows):
            raise UserError("lora.trainable_token_indices: lm_head is tied to embed_tokens; name its tokens there")
        pair = [next(name for name in modules if name.endswith(end)) for end in ENDS]
        rows = dict.fromkeys(pair, next(iter(rows.values())))
    return rows


def within(cfg: LoRAConfig, names: list[str]) -> set[str]:
    """What cfg.modules_to_save keeps from being adapted: each as parts of a name, and what is inside."""
    return {name for name in names if any(f".{saved}." in f".{name}." for saved in cfg.modules_to_save)}


def targets(cfg: LoRAConfig, names: list[str], found: dict[str, set[str]]) -> list[str]:
    """The names that cfg.target_modules asks for, before anything is excluded."""
    said = cfg.target_modules
    if said == "all-linear":
        said = LINEARS
    if isinstance(said, str):
        if not found[said]:
            raise UserError(
                f"lora.target_modules: no module's whole name matches {shortened(said, 200)!r}; "
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
        shown = ", ".join(shortened(each.removeprefix(r"(.*\.)?"), 200) for each in wild)
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
