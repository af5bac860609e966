"""What an adapter has learned: the singular values of each update, and its size beside that of its weight.

s B A is never made. With B = Q_b R_b and A^T = Q_a R_a, its singular values are those of the small s R_b R_a^T (r, r).
A variant with a merged_weight of its own is no such product in general: there the dense merged_weight(W) - W is
decomposed, which works for any variant and takes longer.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from minitune import adapters, checkpoint, parallel, peft_format, pretrained, runs, shards
from minitune.adapters.lora import LoRALinear
from minitune.build import compose, fill
from minitune.checkpoint import Damaged
from minitune.config import Config, LoRAConfig, load_config
from minitune.errors import UserError
from minitune.explain import Update, UpdatesView
from minitune.merge import through_four_bits
from minitune.model import Llama
from minitune.nf4 import NF4Linear
from minitune.precision import DTYPES
from minitune.resume import load_trained

CPU = torch.device("cpu")
ENERGY = 0.9  # share of the squared norm


def view(folder: Path) -> UpdatesView:
    """The updates of a run, a checkpoint of one, or an adapter folder in PEFT's layout. Raises UserError."""
    model, cfg, base = opened(folder)
    leaves = pretrained.base_leaves(model)
    found, beside = [], []  # what trains beside the adapters of linears is no update of low rank
    with shards.Shards(base) as weights, torch.no_grad():
        for name, adapter in adapters.adapters(model).items():
            if not isinstance(adapter, tuple(adapters.ADAPTERS.values())):
                beside.append(name)
                continue
            weight = weights.tensor(f"{name}.weight").to(DTYPES[cfg.model.dtype])
            if isinstance(leaves[f"{name}.weight"][0], NF4Linear):
                weight = through_four_bits(weight)
            found.append(update(name, adapter, weight.double()))
    trained_on = "in four bits, as trained on" if cfg.method == "qlora" else f"in {cfg.model.dtype}"
    if beside:
        trained_on += f" ({', '.join(beside)} trained beside, not shown)"
    return UpdatesView(str(folder), cfg.lora.variant, cfg.lora.r, trained_on, found)


def opened(folder: Path) -> tuple[Llama, Config, Path]:
    """A model whose adapters are filled, and alone have memory where they need no base; its recipe, and the folder of
    its base."""
    run = folder.parent.parent if (folder / checkpoint.MANIFEST).exists() else folder
    if (folder / peft_format.CONFIG).exists():
        lora, where = peft_format.read_config(folder)
        cfg, base = of_adapter(lora, where.path, where.revision)
    elif run == folder:
        if not (folder / "config.toml").exists():
            raise UserError(
                f"{folder} is no run folder, no checkpoint and no adapter folder: it has no config.toml, "
                f"{checkpoint.MANIFEST} or {peft_format.CONFIG}"
            )
        cfg, base = runs.open_run(folder)
    else:
        if not (run / "config.toml").exists():
            raise UserError(f"{folder} is a checkpoint outside of its run: {run} has no config.toml")
        cfg = load_config([str((run / "config.toml").absolute()), *runs.HOW_TO_TRAIN])
        base = pretrained.find(cfg.model.path, cfg.model.revision)
    if cfg.method == "full":
        raise UserError(f"{folder} trained the whole model and has no adapter to explain")
    model, _ = compose(cfg, base, CPU)
    if any(list(module.buffers(recurse=False)) for module in adapters.own_modules(model)):
        fill(model, cfg, base, CPU)  # what stands in no checkpoint follows from the seed and the base's weights
    else:
        parallel.materialize(adapters.own_modules(model), CPU)
    if (folder / peft_format.CONFIG).exists():
        peft_format.load(folder, model)
    elif run == folder:
        peft_format.load(folder / "adapter", model)
    else:
        try:
            load_trained(folder, model)
        except Damaged as damage:
            raise UserError(f"{folder} is damaged: {damage}; name another checkpoint") from None
    return model, cfg, base


def of_adapter(lora: LoRAConfig, path: str, revision: str) -> tuple[Config, Path]:
    """An adapter's recipe as far as its files say, over the base as its files are."""
    base = pretrained.find(path, revision)
    kinds = {entry.dtype for entry in shards.headers(base).values()}
    dtype = "bfloat16" if kinds == {"BF16"} else "float32"
    plain = load_config(["method=lora", f"model.dtype={dtype}", *runs.HOW_TO_TRAIN])
    return Config(**{**vars(plain), "lora": lora}), base


def update(name: str, adapter: LoRALinear, weight: Tensor) -> Update:
    """What an adapter adds to `weight` (out, in), in fp64."""
    product = type(adapter).merged_weight is LoRALinear.merged_weight
    if product:
        values = of_product(adapter.lora_B, adapter.lora_A, adapter.scaling)
    else:
        values = torch.linalg.svdvals(adapter.double().merged_weight(weight) - weight)
    block = name.split(".layers.")[-1].split(".")[0]
    norm = math.sqrt(values.square().sum().item())
    return Update(
        name=name,
        layer=int(block) if block.isdigit() else None,
        module=adapters.last_name(name),
        values=values.tolist(),
        effective_rank=effective_rank(values),
        rank_90=rank_of_energy(values),
        norm=norm,
        weight_norm=weight.norm().item(),
        product=product,
    )


def of_product(B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """The singular values of scaling * B (out, r) @ A (r, in), largest first, in fp64."""
    _, right = torch.linalg.qr(B.double())
    _, left = torch.linalg.qr(A.double().T)
    return torch.linalg.svdvals(scaling * right @ left.T)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the values as shares of their sum; 0 for an update of zero.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007,
    https://ieeexplore.ieee.org/document/7098875.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return torch.special.entr(shares).sum().exp().item()


def rank_of_energy(values: Tensor, share: float = ENERGY) -> int:
    """How many of the largest values hold this share of the squared norm; 0 for an update of zero."""
    energy = values.square().cumsum(0)
    if not len(values) or energy[-1] == 0:
        return 0
    return int((energy < share * energy[-1]).sum()) + 1
