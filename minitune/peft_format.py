"""An adapter folder in PEFT's layout, in and out: adapter_config.json and adapter_model.safetensors.

PEFT loads what is written here as it is; what is read here is refused unless it is an adapter that minitune runs
exactly.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitune import files
from minitune.adapters import ADAPTERS, adapters, exported, last_name
from minitune.config import LINEARS, LoRAConfig, ModelConfig
from minitune.errors import UserError
from minitune.foreign import inside, read_json
from minitune.header import open_tensors, read_header

HIGHEST_RANK = 65536
FLOATS = ("F32", "F16", "BF16")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
COMMON: dict[str, Any] = {  # keys that change what an adapter computes, with the one value that is run here
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}
PLAIN: dict[str, Any] = {  # those of LoRA alone; a variant of it has other values for some
    "peft_type": "LORA",
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "exclude_modules": None,
}
READ = ("base_model_name_or_path", "revision", "target_modules")
LORA_KEYS = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}  # ours -> PEFT's
IGNORED = (  # keys that change nothing in a trained adapter
    "task_type",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "ensure_weight_tying",
    "d_initial",
    "init_weights",
    "projection_prng_key",
)
INITS = (True, False, "gaussian", "eva", "orthogonal")  # starts that are as True is once an adapter is trained


def save(folder: Path, model: nn.Module, lora: LoRAConfig, base: ModelConfig) -> None:
    """Write the adapters of `model`, trained as `lora` says, as an adapter folder, all in fp32."""
    lora = exported(lora)
    kind = ADAPTERS[lora.variant]
    config = {
        **plain(kind),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "revision": base.revision or None,
        "inference_mode": True,
        **{theirs: getattr(lora, ours) for ours, theirs in keys_of(kind).items()},
        "target_modules": sorted(lora.target_modules),
    }
    with files.new_folder(folder) as part:
        files.write_tensors(part / WEIGHTS, export(model))
        files.write_json(part / CONFIG, config)


def load(folder: Path, model: nn.Module) -> None:
    """Fill the adapters of `model`, whose base is loaded, from an adapter folder: every tensor has its place, and every
    place its tensor.

    Raises:
        UserError: names that match nothing, places left empty, other shapes; all listed.
    """
    path = inside(folder, WEIGHTS)
    said, places = read_header(path), state(model)
    problems = [f"{name} matches nothing in the model" for name in sorted(said.keys() - places.keys())]
    problems += [f"{name} is missing" for name in sorted(places.keys() - said.keys())]
    for name in sorted(said.keys() & places.keys()):
        if said[name].shape != tuple(places[name].shape):
            problems.append(f"{name} is {said[name].shape}, the model has {tuple(places[name].shape)}")
        elif said[name].dtype not in FLOATS:
            problems.append(f"{name} has dtype {said[name].dtype}; only {', '.join(FLOATS)} are read")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{path} does not fit this model:\n  " + "\n  ".join(problems[:20]) + more)
    for adapter in adapters(model).values():
        if hasattr(adapter, "export"):
            adapter.reset_parameters()  # it stands on what it started from
    with torch.no_grad(), open_tensors(path) as file:
        for name, place in places.items():
            place.copy_(file.get_tensor(name))
            if not place.isfinite().all():
                raise UserError(f"{path}: {name} holds values that are no numbers (NaN or infinity)")


def state(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name -> tensor, for every parameter of every adapter."""
    found = {}
    for name, adapter in adapters(model).items():
        own = {name for name, _ in adapter.named_parameters(recurse=False)}
        frozen = {name for name, _ in adapter.named_buffers(recurse=False)}
        named = adapter.PEFT_NAMES.keys()
        assert own == named - frozen, f"{type(adapter).__name__}.PEFT_NAMES must name {own}"
        found |= {f"{PREFIX}{name}.{theirs}": getattr(adapter, ours) for ours, theirs in adapter.PEFT_NAMES.items()}
        shared = getattr(adapter, "SHARED_NAMES", {})
        found |= {theirs: getattr(adapter.shared, ours) for ours, theirs in shared.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def export(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter folder holds: the adapters as they are, or as what others load of them."""
    if not all(hasattr(adapter, "export") for adapter in adapters(model).values()):
        return state(model)
    return {
        f"{PREFIX}{name}.{theirs}": tensor.contiguous()
        for name, adapter in adapters(model).items()
        for theirs, tensor in adapter.export().items()
    }


def read_config(folder: Path) -> tuple[LoRAConfig, ModelConfig]:
    """What adapter an adapter folder holds, and on which base. Raises UserError for kinds that are not run here."""
    path = inside(folder, CONFIG)
    values = read_json(path)
    variant = next((name for name, kind in ADAPTERS.items() if says(values, kind.PEFT_CONFIG)), "lora")
    said, keys = plain(ADAPTERS[variant]), keys_of(ADAPTERS[variant])
    fine = {key: INITS if key == "init_lora_weights" and value is True else (value,) for key, value in said.items()}
    problems = [key for key, value in fine.items() if values.get(key) not in (*value, None)]
    problems += [key for key in values if values[key] and key not in (*said, *READ, *keys.values(), *IGNORED)]
    if problems:
        listed = ", ".join(f"{key} = {values[key]!r}" for key in problems)
        raise UserError(f"{path}: this kind of adapter is not supported: {listed}")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets) or not targets:
        raise UserError(f"{path}: target_modules must be a list of module names, here it is {targets!r}")
    r, alpha = (values.get(keys[ours]) if ours in keys else getattr(LoRAConfig(), ours) for ours in ("r", "alpha"))
    base = values.get("base_model_name_or_path")
    revision = values.get("revision") or ""
    if (
        type(r) is not int
        or not 0 < r <= HIGHEST_RANK
        or isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not 0 < alpha < 1e9
    ):
        raise UserError(
            f"{path}: r is {r!r} and lora_alpha {alpha!r}; both must be positive numbers, and r at most {HIGHEST_RANK}"
        )
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is missing, so the base of this adapter is unknown")
    if not isinstance(revision, str):
        raise UserError(f"{path}: revision is {revision!r} where a branch, tag or commit is needed")
    if unknown := sorted({last_name(target) for target in targets} - {*LINEARS, "lm_head"}):
        raise UserError(
            f"{path}: target_modules names {', '.join(unknown)[:200]}, which no linear of a Llama is called"
        )
    for name, entry in read_header(inside(folder, WEIGHTS)).items():  # before anything takes memory for this rank
        if name.endswith((".lora_A.weight", ".vera_A")) and entry.shape[:1] != (r,):
            raise UserError(f"{path} says r = {r}, but {name} in {WEIGHTS} is {entry.shape}")
    names = tuple(sorted({last_name(target) for target in targets}))
    lora = LoRAConfig(variant=variant, r=r, alpha=alpha, dropout=0.0, target_modules=names)
    return lora, ModelConfig(path=base, revision=revision)


def plain(kind: type[nn.Module]) -> dict[str, Any]:
    """The keys that change what an adapter of this variant computes, each with the one value that is run here."""
    of_lora = kind.PEFT_CONFIG.get("peft_type", "LORA") == "LORA"
    return COMMON | (PLAIN if of_lora else {}) | kind.PEFT_CONFIG


def keys_of(kind: type[nn.Module]) -> dict[str, str]:
    return getattr(kind, "PEFT_KEYS", LORA_KEYS)


def says(values: dict[str, Any], variant: dict[str, object]) -> bool:
    """Whether adapter_config.json has every key of a variant (plain LoRA, which has none, is what is left over)."""
    return bool(variant) and all(values.get(key) == value for key, value in variant.items())
