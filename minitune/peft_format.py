"""An adapter folder in PEFT's layout, in and out: adapter_config.json and adapter_model.safetensors.

PEFT loads what is written here as it is; what is read here is refused unless it is an adapter that minitune runs
exactly.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitune import files
from minitune.adapters import ADAPTERS, adapters, exported
from minitune.adapters.whole import TrainedCopy
from minitune.config import ENDS, LINEARS, LoRAConfig, ModelConfig, what_is_wrong
from minitune.errors import UserError
from minitune.foreign import inside, read_json
from minitune.header import open_tensors, read_header
from minitune.secrets import shortened

HIGHEST_RANK = 65536
FLOATS = ("F32", "F16", "BF16")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
COMMON: dict[str, Any] = {  # keys that change what an adapter computes, with the one value that is run here
    "bias": "none",
    "fan_in_fan_out": False,
}
PLAIN: dict[str, Any] = {  # those of LoRA alone; a variant of it has other values for some
    "peft_type": "LORA",
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
}
SHAPE = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
)
EVERYWHERE = ("target_modules", "layers_to_transform", "layers_pattern", "modules_to_save")  # not LoRA's alone
READ = ("base_model_name_or_path", "revision", *SHAPE)
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
    """Write the adapters of `model`, trained as `lora` says, as an adapter folder: all in fp32, but what trains whole
    in the dtype that it computes in."""
    lora = exported(lora)
    kind = ADAPTERS[lora.variant]
    config = {
        **plain(kind),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "revision": base.revision or None,
        "inference_mode": True,
        **{theirs: getattr(lora, ours) for ours, theirs in keys_of(kind).items()},
        **{key: value for key, value in shape(lora).items() if of_lora(kind) or key in EVERYWHERE},
    }
    if any(isinstance(each, TrainedCopy) and each.twin for each in adapters(model).values()):
        config["ensure_weight_tying"] = True
    files.make_parents(folder.parent)
    with files.new_folder(folder) as part:
        files.write_tensors(part / WEIGHTS, {**export(model), **copies(model)})
        files.write_json(part / CONFIG, config)


def shape(lora: LoRAConfig) -> dict[str, Any]:
    """The keys that say which modules are adapted, and with which rank and alpha."""
    rows = lora.trainable_token_indices or ()
    targets = LINEARS if lora.target_modules == "all-linear" else lora.target_modules
    return {
        "target_modules": listed(targets),
        "exclude_modules": listed(lora.exclude_modules) or None,
        "layers_to_transform": list(lora.layers_to_transform) or None,
        "layers_pattern": None,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "modules_to_save": list(lora.modules_to_save) or None,
        "trainable_token_indices": rows if isinstance(rows, dict) else list(rows) or None,
    }


def listed(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else sorted(names)


def vllm_limits(lora: LoRAConfig) -> str | None:
    """What vLLM would do wrong with an adapter folder of this shape, or None."""
    if lora.modules_to_save or lora.trainable_token_indices:
        return "vLLM refuses adapters with modules_to_save or trainable_token_indices; merge this one for vLLM"
    if lora.rank_pattern or lora.alpha_pattern:
        return "vLLM ignores rank_pattern and alpha_pattern and would scale this adapter wrongly; merge it for vLLM"
    return None


def load(folder: Path, model: nn.Module) -> None:
    """Fill the adapters of `model`, whose base is loaded, from an adapter folder: every tensor has its place, and every
    place its tensor.

    Raises:
        UserError: names that match nothing, places left empty, other shapes; all listed.
    """
    check_fits(folder, model)
    path, places, copied = inside(folder, WEIGHTS), state(model), base_copies(model)
    for adapter in adapters(model).values():
        if hasattr(adapter, "export"):
            adapter.reset_parameters()  # it stands on what it started from
    with torch.no_grad(), open_tensors(path) as file:
        for name in copied.keys() & set(file.keys()):
            if not copied[name].is_meta and not torch.equal(file.get_tensor(name).to(copied[name]), copied[name]):
                raise UserError(
                    f"{path}: {name} is a weight of the base, as PEFT saves it beside an adapted embedding or head, "
                    "and it differs from that of the base here; the adapter was trained on another base, so name that "
                    "one as base_model_name_or_path"
                )
        filled: dict[int, str] = {}
        for name, place in places.items():
            twin = filled.setdefault(place.data_ptr(), name)
            if twin != name and not torch.equal(file.get_tensor(twin), file.get_tensor(name)):
                raise UserError(f"{path}: {name} and {twin} differ, and the model ties them; this adapter unties it")
            place.copy_(file.get_tensor(name))
            if not place.isfinite().all():
                raise UserError(f"{path}: {name} holds values that are no numbers (NaN or infinity)")


def check_fits(folder: Path, model: nn.Module) -> None:
    """Hold an adapter folder's header to a model, which may still be without memory. Raises as `load` does."""
    path = inside(folder, WEIGHTS)
    said, places, copied = read_header(path), state(model), base_copies(model)
    problems = [f"{name} matches nothing in the model" for name in sorted(said.keys() - places.keys() - copied.keys())]
    problems += [f"{name} is missing" for name in sorted(places.keys() - said.keys())]
    for name in sorted(said.keys() & (places | copied).keys()):
        if said[name].shape != (shape := tuple((places | copied)[name].shape)):
            problems.append(f"{name} is {said[name].shape}, the model has {shape}")
        elif said[name].dtype not in FLOATS:
            problems.append(f"{name} has dtype {said[name].dtype}; only {', '.join(FLOATS)} are read")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{path} does not fit this model:\n  " + "\n  ".join(problems[:20]) + more)


def base_copies(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name -> the base's own weight, of an adapted embedding or head: its files may hold it too."""
    found = {name: each for name, each in adapters(model).items() if name.endswith(ENDS)}
    return {f"{PREFIX}{name}.base_layer.weight": adapter.base.weight.detach() for name, adapter in found.items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name -> tensor, for every parameter of every adapter."""
    found = {}
    for name, adapter in adapters(model).items():
        owner = adapter.twin[0] if isinstance(adapter, TrainedCopy) and adapter.twin else adapter
        own = {each for each, _ in owner.named_parameters(recurse=False)}
        frozen = {each for each, _ in owner.named_buffers(recurse=False)}
        named = adapter.PEFT_NAMES.keys()
        assert own == named - frozen, f"{type(adapter).__name__}.PEFT_NAMES must name {own}"
        found |= {f"{PREFIX}{name}.{theirs}": getattr(owner, ours) for ours, theirs in adapter.PEFT_NAMES.items()}
        shared = getattr(adapter, "SHARED_NAMES", {})
        found |= {theirs: getattr(adapter.shared, ours) for ours, theirs in shared.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def export(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter folder holds: the adapters as they are, or as what others load of them."""
    found = state(model)
    for name, adapter in adapters(model).items():
        if hasattr(adapter, "export"):
            found = {key: value for key, value in found.items() if not key.startswith(f"{PREFIX}{name}.")}
            found |= {f"{PREFIX}{name}.{theirs}": each.contiguous() for theirs, each in adapter.export().items()}
    return found


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Of the modules that train whole, what `state` has of them, in the dtype that they compute in."""
    kept = state(model)
    dtypes = {
        f"{PREFIX}{name}.weight": adapter.base.weight.dtype
        for name, adapter in adapters(model).items()
        if isinstance(adapter, TrainedCopy)
    }
    return {name: kept[name].to(dtype) for name, dtype in dtypes.items()}


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
    chosen = read_shape(values, path)
    ranks = {(rank,) for rank in (r, *chosen["rank_pattern"].values())}
    for name, entry in read_header(inside(folder, WEIGHTS)).items():  # before anything takes memory for this rank
        if name.endswith((".lora_A.weight", ".vera_A")) and entry.shape[:1] not in ranks:
            said_so = " or ".join(str(rank) for (rank,) in sorted(ranks))
            raise UserError(f"{path} says r = {said_so}, but {name} in {WEIGHTS} is {entry.shape}")
    lora = LoRAConfig(variant=variant, r=r, alpha=alpha, dropout=0.0, **chosen)
    return lora, ModelConfig(path=base, revision=revision)


def read_shape(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Which modules an adapter_config.json is about, as fields of LoRAConfig, each held to the rules of its key."""
    layers, pattern = values.get("layers_to_transform"), values.get("layers_pattern")
    if pattern not in (None, "", [], "layers", ["layers"]):
        raise UserError(
            f"{path}: layers_pattern is {shortened(str(pattern), 100)!r}; the layers of a Llama are called layers"
        )
    targets = values.get("target_modules")
    if isinstance(targets, list) and not all(isinstance(target, str) for target in targets):
        raise UserError(
            f"{path}: target_modules must be a list of module names, here it is {shortened(str(targets), 200)}"
        )
    said = {
        "target_modules": sorted(set(targets)) if isinstance(targets, list) else targets,
        "exclude_modules": values.get("exclude_modules") or [],
        "layers_to_transform": [layers] if type(layers) is int else layers or [],
        "rank_pattern": values.get("rank_pattern") or {},
        "alpha_pattern": values.get("alpha_pattern") or {},
        "modules_to_save": values.get("modules_to_save") or [],
        "trainable_token_indices": values.get("trainable_token_indices") or [],
    }
    for key, value in said.items():
        if complaint := what_is_wrong(f"lora.{key}", value):
            raise UserError(f"{path}: {key} {complaint}")
    if any(rank > HIGHEST_RANK for rank in said["rank_pattern"].values()):
        raise UserError(f"{path}: rank_pattern asks for a rank above {HIGHEST_RANK}")
    if isinstance(targets, str) and said["layers_to_transform"]:
        raise UserError(f"{path}: layers_to_transform goes with a list of target_modules, not with an expression")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}


def of_lora(kind: type[nn.Module]) -> bool:
    return kind.PEFT_CONFIG.get("peft_type", "LORA") == "LORA"


def plain(kind: type[nn.Module]) -> dict[str, Any]:
    """The keys that change what an adapter of this variant computes, each with the one value that is run here."""
    return COMMON | (PLAIN if of_lora(kind) else {}) | kind.PEFT_CONFIG


def keys_of(kind: type[nn.Module]) -> dict[str, str]:
    return getattr(kind, "PEFT_KEYS", LORA_KEYS)


def says(values: dict[str, Any], variant: dict[str, object]) -> bool:
    """Whether adapter_config.json has every key of a variant (plain LoRA, which has none, is what is left over)."""
    return bool(variant) and all(values.get(key) == value for key, value in variant.items())
