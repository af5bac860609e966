"""The one place where a model is put together: the order of composition, a line a technique."""

from pathlib import Path

import torch

from minitune import adapters, attention, byhand, host, nf4, parallel, plan, pretrained, sharding
from minitune.byhand import Keep
from minitune.config import Config
from minitune.errors import UserError
from minitune.model import Llama, LlamaConfig
from minitune.offload import HostMemory
from minitune.plan import Choice, Memory
from minitune.precision import DTYPES


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
    dtype = DTYPES[cfg.model.dtype]
    with torch.device("meta"):
        model = Llama(config)
    pretrained.check_weights(model, base)  # before anything takes memory on config.json's word
    model.to(dtype)
    if cfg.method == "qlora":
        nf4.quantize_linears(model, dtype)  # Linear -> NF4Linear, still empty
    if cfg.method != "full":
        adapters.attach(model, cfg.lora)  # freeze all, wrap the targets
    kernel = attention.use(model, cfg.model.attention, device, dtype)

    slow = why_not_by_hand(model, cfg, device)
    how_spread, need, choice = spread(model, config, cfg, device, by_hand=slow is None)
    if slow is None:
        byhand.by_hand(model, choice.keep, HostMemory(device) if choice.host else None, choice.dense)
        how = "fused blocks"
    else:
        compiled = cfg.train.compile == "auto" and device.type == "cuda"
        if compiled:
            parallel.compile_blocks(model)
        parallel.recompute_blocks(
            layer for layer, keep in zip(model.layers, choice.keep, strict=True) if keep is not Keep.ALL
        )  # around the compiled block, so that its code is used twice
        how = f"{'compiled' if compiled else 'plain'} blocks ({slow})" if slow else "plain blocks"

    trained = [p for p in model.parameters() if p.requires_grad]
    if cfg.method == "full" and cfg.train.gradient_accumulation_steps * parallel.world() > 1:
        for parameter in trained:
            parameter.grad_dtype = torch.float32  # a sum over micro-batches; of one alone bf16 keeps what bf16 made
    if parallel.world() > 1:
        how += f", {parallel.world()} processes, {how_spread}"
    if how_spread != "replicate":
        if cfg.method == "full" and cfg.optim.name == "paged_adamw_8bit" and device.type == "cuda":
            raise UserError(
                "optim.name: 8-bit moments have a scale for every 256 numbers, which ranks would cut anywhere; set it "
                "to paged_adamw_32bit where parallel.sharding is not replicate"
            )
        sharding.shard(model, how_spread, device)
    held = need.on_host(choice)
    parts = [
        f"{sum(p.numel() for p in trained):,} parameters train",
        f"{cfg.model.dtype} on {device.type}",
        f"{kernel} attention",
        how,
        str(choice),
        f"about {need.total(choice) / 1e9:.3g} GB" + (f" and {held / 1e9:.3g} of the host's" if held else ""),
    ]
    return model, ", ".join(parts)


def spread(
    model: Llama, config: LlamaConfig, cfg: Config, device: torch.device, by_hand: bool
) -> tuple[str, Memory, Choice]:
    """How the ranks hold the model, what that needs on each, and what its blocks keep: as the recipe says, or the
    first that fits of a model whole on each, on each machine, on all."""
    here, world = sharding.ranks_a_machine(), parallel.world()
    ways = {"replicate": 1, "hybrid": here, "full": world}
    if 1 in (here, world // here):
        ways["hybrid"] = ways["replicate" if here == 1 else "full"]  # on one machine, or with one rank on each
    wanted = cfg.parallel.sharding
    free = -parallel.highest(-parallel.free_memory(device))  # of the rank that has least
    host_free = -parallel.highest(-host.free_memory() // here)
    for shards in sorted({ways[wanted]} if wanted != "auto" else set(ways.values())):
        need = plan.memory(model, config, cfg, by_hand, world, shards)
        choice = plan.choose(need, free, cfg, by_hand, host_free)
        if plan.fits(need, choice, free):
            break
    how = "replicate" if shards == 1 else "full" if shards == world else "hybrid"
    return how, need, choice


def why_not_by_hand(model: Llama, cfg: Config, device: torch.device) -> str | None:
    """Why the blocks do not run by hand (`byhand`), or None; empty where nobody would expect it."""
    if device.type != "cuda" or cfg.train.fused == "none":
        return ""
    if cfg.model.dtype != "bfloat16":
        return f"fused ones compute in bfloat16, not {cfg.model.dtype}"
    return next(filter(None, map(byhand.refusal, model.layers)), None) or byhand.fault(model, device)


def fill(model: Llama, cfg: Config, base: Path, device: torch.device) -> None:
    """Give a composed model memory and values: the base's weights, and the adapters' start."""
    blocks = [list(layer.modules()) for layer in model.layers]
    inside = {id(module) for modules in blocks for module in modules}
    parallel.materialize((module for module in model.modules() if id(module) not in inside), device)
    for layer, modules in zip(model.layers, blocks, strict=True):
        parallel.materialize(modules, device)
        if cfg.method != "qlora" and not sharding.is_sharded(model):
            byhand.lay_side_by_side(layer)  # at once: what it frees serves the next block
    pretrained.load_base(model, base)  # stream the shards, quantizing as they come
    adapters.reset(model, cfg.seed)  # the same start wherever it runs
    if sharding.is_sharded(model):
        sharding.check(model, device)  # what is gathered is what was read
