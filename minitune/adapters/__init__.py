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

What does not train is a buffer (`persistent=False`) that reset_parameters fills from the seed or the base's weights
(`base_weight.py` gathers these): no checkpoint holds it, and every rank has all of it. One that PEFT's file holds is
named in PEFT_NAMES as well.

Few variants need more, and say so by having it:
    learning_rate_ratios     name of a parameter -> its learning rate, as a multiple of the recipe's
    correct_gradients()      called once a step, on gradients that are summed and measured, before the optimizer
    share(adapters)          class method, for all of a model at once: let them have modules in common, each as its
                             `self.shared`; SHARED_NAMES is for those what PEFT_NAMES is for the rest
    exported(cfg), export()  what others load of it, where that is another variant: its LoRAConfig (a class method),
                             and PEFT's names -> tensors
    PEFT_KEYS                what PEFT calls LoRAConfig's r, alpha and dropout; those not in it play no part
    CONSTANT_IN_BACKWARD     methods whose result the gradient takes for a constant, for whoever checks the gradient
    KEPT_OUTPUTS             how many tensors (tokens, out) forward leaves for backward, for the memory plan
"""

import torch
from torch import nn

from minitune import seeds, surgery
from minitune.adapters import targets
from minitune.adapters.dora import DoRALinear
from minitune.adapters.embedding import LoRAEmbedding
from minitune.adapters.lora import LoRALinear
from minitune.adapters.lora_fa import LoRAFALinear
from minitune.adapters.loraplus import LoRAPlusLinear
from minitune.adapters.olora import OLoRALinear
from minitune.adapters.oplora import OPLoRALinear
from minitune.adapters.pissa import PiSSALinear
from minitune.adapters.rows import TokenRows
from minitune.adapters.rslora import RsLoRALinear
from minitune.adapters.vera import VeRALinear
from minitune.adapters.whole import TrainedCopy
from minitune.config import ENDS, LoRAConfig
from minitune.errors import UserError

ADAPTERS: dict[str, type[nn.Module]] = {
    "lora": LoRALinear,
    "rslora": RsLoRALinear,
    "dora": DoRALinear,
    "pissa": PiSSALinear,
    "olora": OLoRALinear,
    "loraplus": LoRAPlusLinear,
    "lora_fa": LoRAFALinear,
    "vera": VeRALinear,
    "oplora": OPLoRALinear,
}


def attach(model: nn.Module, cfg: LoRAConfig) -> list[str]:
    """Freeze the model and put an adapter around each module that `targets.choose` chooses.

    Returns the names of the modules that train. Raises UserError for what matches nothing or cannot be adapted, as a
    head that shares its weight with the embedding (merging it would change the embedding too).
    """
    model.requires_grad_(False)
    chosen, kind = targets.choose(model, cfg), ADAPTERS[cfg.variant]
    if kind.PEFT_CONFIG.get("peft_type", "LORA") != "LORA":
        refuse_lora_s_own(cfg, set(chosen.whole) if model.config.tie_word_embeddings else set())
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
            made = kind(leaf, chosen.adapted[name])
        if name.endswith("embed_tokens"):
            twins[True] = made
        return made.train(leaf.training)

    asked = {*chosen.adapted, *chosen.whole, *chosen.rows}
    names = surgery.replace(model, lambda name, leaf: name in asked, make)
    if hasattr(kind, "share"):
        kind.share([each for each in adapters(model).values() if isinstance(each, kind)])
    return names


def refuse_lora_s_own(cfg: LoRAConfig, tied_and_whole: set[str]) -> None:
    """Refuse what PEFT's files can say of LoRA and of no other kind of adapter."""
    keys = ("rank_pattern", "alpha_pattern", "exclude_modules", "trainable_token_indices")
    said = [key for key in keys if getattr(cfg, key)]
    said += ["modules_to_save"] if any(name.endswith(ENDS) for name in tied_and_whole) else []
    if said:
        raise UserError(f"lora.{said[0]}: variant {cfg.variant} cannot have it in PEFT's files here; leave it out")


def reset(model: nn.Module, seed: int) -> None:
    """Starting values for all adapters, each from a seed of its own name: order and rank count do not matter."""
    for name, adapter in adapters(model).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "adapter", name))
            adapter.reset_parameters()


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The adapters of a model by the name of the linear each one wraps."""
    kinds = (*ADAPTERS.values(), LoRAEmbedding, TrainedCopy, TokenRows)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def own_modules(model: nn.Module) -> list[nn.Module]:
    """The adapters and what they are made of or share, without what they wrap; each once."""
    found = {}
    for adapter in adapters(model).values():
        for part in (adapter, *(child for name, child in adapter.named_children() if name != "base")):
            found[id(part)] = part
    return list(found.values())


def exported(cfg: LoRAConfig) -> LoRAConfig:
    """The adapter that a run of this recipe hands over: another one, where a variant is of use to nobody as it is."""
    kind = ADAPTERS[cfg.variant]
    return kind.exported(cfg) if hasattr(kind, "exported") else cfg


def last_name(name: str) -> str:
    return name.rpartition(".")[2]
