"""Adapters: small trainable modules around frozen linears. A variant is one file and one line in ADAPTERS.

A variant is a module class with four verbs:
    __init__(base, cfg)      keep the frozen linear `base` whole as `self.base`; make fp32 parameters
    reset_parameters()       give them their starting values; the base's weights are loaded by then
    forward(x)               (..., in) -> (..., out), in the dtype of x
    merged_weight(weight)    the dense weight (out, in) that does the same as forward without dropout,
                             computed in the dtype of `weight`
and two tables for PEFT's files: PEFT_NAMES, from the names of its parameters (which lie directly on the module) to
those in the file, and PEFT_CONFIG, the keys of adapter_config.json that say which variant it is. Freezing, saving,
resuming, merging and export follow from these. Which modules get one, with which rank and alpha: `targets.py`.
"""

import torch
from torch import nn

from minitune import seeds, surgery
from minitune.adapters import targets
from minitune.adapters.embedding import LoRAEmbedding
from minitune.adapters.lora import LoRALinear
from minitune.adapters.rows import TokenRows
from minitune.adapters.whole import TrainedCopy
from minitune.config import LoRAConfig

ADAPTERS: dict[str, type[LoRALinear]] = {
    "lora": LoRALinear,
}


def attach(model: nn.Module, cfg: LoRAConfig) -> list[str]:
    """Freeze the model and put an adapter around each module that `targets.choose` chooses.

    Returns the names of the modules that train. Raises UserError for what matches nothing or cannot be adapted, as a
    head that shares its weight with the embedding (merging it would change the embedding too).
    """
    model.requires_grad_(False)
    chosen = targets.choose(model, cfg)
    name_of = {module: name for name, module in model.named_modules()}
    tied, twins = model.config.tie_word_embeddings, {}

    def make(leaf: nn.Module) -> nn.Module:
        name = name_of[leaf]
        twin = twins.get(tied and name.endswith("lm_head"))  # the embedding comes first in the model
        if name in chosen.whole:
            made = TrainedCopy(leaf, cfg, twin)
        elif name in chosen.rows:
            made = TokenRows(leaf, cfg, chosen.rows[name], twin)
        elif isinstance(leaf, nn.Embedding):
            made = LoRAEmbedding(leaf, chosen.adapted[name])
        else:
            made = ADAPTERS[cfg.variant](leaf, chosen.adapted[name])
        if name.endswith("embed_tokens"):
            twins[True] = made
        return made.train(leaf.training)

    asked = {*chosen.adapted, *chosen.whole, *chosen.rows}
    return surgery.replace(model, lambda name, leaf: name in asked, make)


def reset(model: nn.Module, seed: int) -> None:
    """Starting values for all adapters, each from a seed of its own name: order and rank count do not matter."""
    for name, adapter in adapters(model).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "adapter", name))
            adapter.reset_parameters()


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapters of a model by the name of the linear each one wraps."""
    kinds = (*ADAPTERS.values(), LoRAEmbedding, TrainedCopy, TokenRows)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def last_name(name: str) -> str:
    return name.rpartition(".")[2]
