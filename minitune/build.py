"""The one place where a model is put together: the order of composition, a line a technique."""

from pathlib import Path

import torch

from minitune import adapters, attention, nf4, parallel, plan, precision, pretrained
from minitune.config import Config
from minitune.model import Llama


def build_model(cfg: Config, base: Path, device: torch.device) -> Llama:
    """The model of a recipe on `device`, ready to train; `base` is the folder of its weights."""
    model, _ = compose(cfg, base, device)
    fill(model, cfg, base, device)
    return model


def compose(cfg: Config, base: Path, device: torch.device) -> tuple[Llama, str]:
    """The model on the meta device, where it has shapes and no memory, and a line that says what it is made of.

    Each step composes with those above it.
    """
    config = pretrained.read_config(base)
    dtype = precision.DTYPES[cfg.model.dtype]
    with torch.device("meta"):
        model = Llama(config)
    if cfg.method == "full":
        precision.keep_masters(model, dtype)  # fp32 weights, cast where they are used
    else:
        model.to(dtype)
    if cfg.method == "qlora":
        nf4.quantize_linears(model, dtype)  # Linear -> NF4Linear, still empty
    if cfg.method != "full":
        adapters.attach(model, cfg.lora)  # freeze all, wrap the targets
    kernel = attention.use(model, cfg.model.attention, device, dtype)

    need = plan.memory(model, config, cfg)
    compiled = cfg.train.compile == "auto" and device.type == "cuda"
    recompute = cfg.train.gradient_checkpointing == "full" or (
        cfg.train.gradient_checkpointing == "auto" and plan.recompute_needed(need, parallel.free_memory(device))
    )
    if compiled:
        parallel.compile_blocks(model)
    if recompute:
        parallel.recompute_blocks(model)  # around the compiled block, so that its code is used twice

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = [
        f"{trained:,} parameters train",
        f"{cfg.model.dtype} on {device.type}",
        f"{kernel} attention",
        "blocks compiled" if compiled else "not compiled",
        "blocks recomputed" if recompute else "no recompute",
        f"about {need.total(recompute) / 1e9:.2g} GB",
    ]
    return model, ", ".join(parts)


def fill(model: Llama, cfg: Config, base: Path, device: torch.device) -> None:
    """Give a composed model memory and values: the base's weights, and the adapters' start."""
    parallel.materialize(model.modules(), device)
    pretrained.load_base(model, base)  # stream the shards, quantizing as they come
    adapters.reset(model, cfg.seed)  # the same start wherever it runs
