"""What depends on more than one key: defaults that follow from others, and keys that cannot stand together."""

import os
from collections.abc import Iterator
from typing import Any

from minitune.config.keys import Config, LoRAConfig, last_name

COMMAND_LINE = "the command line"  # as the place where a key was set
FULL_LEARNING_RATE = 2e-5  # the default where all weights train


def dependent_defaults(cfg: Config) -> dict[str, Any]:
    """Defaults that follow from other keys, for those that the user left alone."""
    defaults: dict[str, Any] = {}
    if cfg.method == "full":
        defaults["optim.learning_rate"] = FULL_LEARNING_RATE
    if cfg.data.eval:
        defaults["data.eval_fraction"] = 0.0
    if not cfg.eval.every_steps or not (cfg.data.eval or cfg.data.eval_fraction):
        defaults["eval.early_stopping_patience"] = 0
    return defaults


def contradictions(cfg: Config, given: dict[str, str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that cannot stand together, and what to do; `given` says where the user set each key that he did set.

    A recipe may hold a [lora] that method=full leaves unused: methods are switched from the command line.
    """
    held_out = ("data.eval", "data.eval_fraction")
    nothing_held_out = not cfg.data.eval and not cfg.data.eval_fraction
    if cfg.train.num_epochs == cfg.train.max_steps == 0:
        yield ("train.num_epochs", "train.max_steps"), "both are 0, which trains nothing; set one of them"
    if cfg.data.eval and cfg.data.eval_fraction:
        yield held_out, "evaluate on files or on a held-out share, not both; set data.eval_fraction=0 or data.eval=[]"
    if twice := [name for name in cfg.data.eval if real(name) in map(real, cfg.data.train)]:
        yield ("data.train", "data.eval"), f"{', '.join(twice)} is in both; evaluate on what is not trained on"
    if cfg.eval.early_stopping_patience and nothing_held_out:
        yield ("eval.early_stopping_patience", *held_out), "nothing is held out to judge by; set the patience to 0"
    if cfg.eval.early_stopping_patience and not cfg.eval.every_steps:
        yield ("eval.early_stopping_patience", "eval.every_steps"), "there are no evaluations to count; set both"
    if cfg.eval.samples and nothing_held_out:
        yield ("eval.samples", *held_out), "no prompts are held out to be answered; set eval.samples=0"
    if cfg.eval.samples and cfg.data.format == "text":
        yield ("eval.samples", "data.format"), "raw text has no prompts to be answered; set eval.samples=0"
    if cfg.data.template != "auto" and cfg.data.format == "text":
        yield ("data.template", "data.format"), "raw text goes into no template; leave it at auto"
    if cfg.data.weights and len(cfg.data.weights) != len(cfg.data.train):
        yield ("data.weights", "data.train"), "one weight for each file of train, or none at all"
    if len(set(cfg.data.columns.values())) < len(cfg.data.columns):
        yield ("data.columns",), "two columns are given one name"
    if cfg.model.attention in ("flash", "varlen") and cfg.model.dtype == "float32":
        yield ("model.attention", "model.dtype"), "flash and varlen compute in bfloat16 alone; use sdpa or auto"
    if cfg.model.revision and (cfg.model.path == "tiny" or os.path.isdir(cfg.model.path)):
        yield ("model.revision", "model.path"), "a model on this disk has no revisions; only one on the Hub has"
    whole = {last_name(name) for name in cfg.lora.modules_to_save}
    rows = cfg.lora.trainable_token_indices
    if twice := whole & set(rows if isinstance(rows, dict) else ["embed_tokens"] if rows else []):
        keys = ("lora.modules_to_save", "lora.trainable_token_indices")
        yield keys, f"{', '.join(sorted(twice))} trains whole, its rows with it; leave it out of one of them"
    if isinstance(cfg.lora.target_modules, str) and cfg.lora.layers_to_transform:
        keys = ("lora.target_modules", "lora.layers_to_transform")
        yield keys, "an expression names the layers itself; give a list of modules beside layers_to_transform"
    lora = tuple(key for key, place in given.items() if key.startswith("lora.") and place == COMMAND_LINE)
    if cfg.lora.loraplus_lr_ratio != LoRAConfig().loraplus_lr_ratio and cfg.lora.variant != "loraplus":
        yield ("lora.loraplus_lr_ratio", "lora.variant"), "only variant loraplus has two learning rates; leave it out"
    if "lora.alpha" in lora and cfg.lora.variant == "vera":
        yield ("lora.alpha", "lora.variant"), "vera has no alpha, its vectors are the scale; leave it out"
    if cfg.method == "full" and lora:
        yield lora, "method=full trains no adapter; leave it out, or set method=lora"


def real(name: str) -> str:
    """A data file's name, the same for every way to write it."""
    return name if name == "tiny" or "://" in name else os.path.realpath(name)
