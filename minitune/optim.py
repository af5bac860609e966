"""AdamW, plain or paged, and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from minitune import sharding
from minitune.config import OptimConfig
from minitune.masters import MasterAdamW


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> tuple[torch.optim.Optimizer, str]:
    """AdamW, https://arxiv.org/abs/1711.05101, over the trainable parameters, and a line that says what it is.

    The paged ones are bitsandbytes': moments in 32 or 8 bits, in memory that moves to the host when the GPU is
    short (QLoRA, section 3). They exist on CUDA alone; elsewhere plain AdamW takes their place, with the same
    arithmetic as the 32-bit one. bf16 parameters have fp32 masters under any of the names (`masters.py`).
    """
    trained = trained_parameters(model)
    on_cuda, dtype = next(iter(trained.values())).is_cuda, next(iter(trained.values())).dtype
    groups = parameter_groups(model, cfg)
    plain = cfg.name == "adamw" or not on_cuda
    line = cfg.name if cfg.name == "adamw" or on_cuda else f"adamw ({cfg.name} needs CUDA; plain AdamW in its place)"
    if dtype == torch.bfloat16:
        eight_bits = cfg.name == "paged_adamw_8bit" and not plain
        return MasterAdamW(groups, cfg.learning_rate, eight_bits, paged=not plain), line
    if plain:
        return torch.optim.AdamW(groups, lr=cfg.learning_rate, fused=on_cuda), line

    import bitsandbytes

    paged = {
        "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[cfg.name]
    return paged(groups, lr=cfg.learning_rate), line


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters by what an optimizer does to them: whether they decay (norms, biases and magnitudes do
    not), and how fast they learn (`learning_rate_ratios` of the module that has them, else as the recipe says)."""
    ratios = {
        f"{prefix}.{name}": ratio
        for prefix, module in model.named_modules()
        for name, ratio in getattr(module, "learning_rate_ratios", {}).items()
    }
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        groups.setdefault((parameter.ndim < 2, ratios.get(name, 1.0)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if flat else cfg.weight_decay,
            "lr": cfg.learning_rate * ratio,
            "learning_rate_ratio": ratio,
        }
        for (flat, ratio), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all that train, each once; of one that is spread over ranks, the rows that are here."""
    return {name: sharding.share(p) for name, p in model.named_parameters() if p.requires_grad}


def learning_rate(step: int, steps: int, cfg: OptimConfig) -> float:
    """The rate of update `step` (0 is the first) of `steps`, in closed form.

    Warmup is linear over the first w = ceil(warmup_ratio * steps) updates: peak (step + 1) / w, so that the first
    update is above zero and update w - 1 has the peak. Then, with p = (step - w) / (steps - w) in [0, 1):
    cosine peak (1 + cos(pi p)) / 2, linear peak (1 - p), constant peak. Zero would come right after the last.
    """
    warmup = math.ceil(cfg.warmup_ratio * steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    match cfg.lr_scheduler:
        case "cosine":
            return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return cfg.learning_rate * (1 - progress)
        case "constant":
            return cfg.learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("learning_rate_ratio", 1.0)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step, its gradients scaled so that their joint norm is at most max_norm (0: as they are).

    Returns the norm before, and whether it and the loss are finite; if not, weights and moments stay as they were.
    PyTorch's fused AdamW and `MasterAdamW` learn both on the device, and nothing waits for it; bitsandbytes' are told
    by the host.
    """
    norm = gradient_norm(model)
    for module in model.modules():
        if hasattr(module, "correct_gradients"):
            module.correct_gradients()
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else torch.ones_like(norm)
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
        optimizer.grad_scale, optimizer.found_inf = 1 / scale, (~finite).float()
        optimizer.step()
    elif isinstance(optimizer, MasterAdamW):
        optimizer.step(scale, finite)
    elif finite:
        torch._foreach_mul_(gradients(model), scale)
        optimizer.step()
    return norm, finite


def gradient_norm(model: nn.Module) -> Tensor:
    """The joint norm of all gradients, fp32, its sums too."""
    grads = gradients(model)
    if all(g.dtype == torch.float32 for g in grads):
        norm = torch.nn.utils.get_total_norm(grads)
    else:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]))
    return sharding.joint_norm(model, norm)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in trained_parameters(model).values() if p.grad is not None]


CONSTANTS = ("qmap1", "qmap2")  # tables of 8-bit levels that all parameters share; the optimizer makes them anew
NEVER_NEGATIVE = ("exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "state2", "absmax1", "absmax2")


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The optimizer's memory as tensors and numbers under `parameter name.key`, for safetensors and JSON."""
    tensors, numbers = {}, {}
    for name, parameter in trained_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in CONSTANTS:
                (tensors if isinstance(value, Tensor) else numbers)[f"{name}.{key}"] = value
    return tensors, numbers


def updates(tensors: dict[str, Tensor], numbers: dict[str, float]) -> set[float]:
    """How many updates the state of each parameter says that it has seen: one number for all, if the state is whole."""
    steps = [value for key, value in (tensors | numbers).items() if key.endswith(".step")]
    return {float(step) if not isinstance(step, Tensor) or step.numel() == 1 else math.nan for step in steps}


@torch.no_grad()
def load_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, float]
) -> None:
    """Put back what `state` returned; nothing at all is the state before the first step.

    Raises:
        ValueError: state for parameters that do not train, or not all of it, or of other shapes or dtypes. Then
            nothing has been put back.
    """
    if not tensors and not numbers:
        return
    named = trained_parameters(model)
    saved: dict[str, dict[str, Tensor | float]] = {name: {} for name in named}
    for full_name, value in (tensors | numbers).items():
        name, _, key = full_name.rpartition(".")
        if name not in saved:
            raise ValueError(f"it holds optimizer state for {name}, which this model does not train")
        saved[name][key] = value

    fresh = empty_state(model, optimizer)
    for name, values in saved.items():
        expected = {key: kind_of(value) for key, value in fresh[name].items() if key not in CONSTANTS}
        if expected != {key: kind_of(value) for key, value in values.items()}:
            raise ValueError(f"its optimizer state for {name} is not whole, or not for this model")
    for name, values in saved.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                fresh[name][key].copy_(value)  # in place: paged memory stays paged
            else:
                fresh[name][key] = value
        optimizer.state[named[name]] = fresh[name]


def kind_of(value: Tensor | float) -> tuple[object, ...]:
    """What must be equal for one value to take another's place."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)


def empty_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor | float]]:
    """The memory that each parameter will have after its first step, by name, allocated as the optimizer does."""
    named = trained_parameters(model)
    if isinstance(optimizer, torch.optim.AdamW):
        return {
            name: {
                "step": torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for name, p in named.items()
        }
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, index)
    states = {name: dict(optimizer.state[p]) for name, p in named.items()}
    optimizer.state.clear()
    return states
