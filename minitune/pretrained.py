"""A Hugging Face model folder as a model: config.json, weights, the Hub.

Only what can be run exactly is accepted; everything else is refused by name.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minitune import digests, parallel, sharding
from minitune.errors import UserError
from minitune.foreign import inside, read_bytes, read_json
from minitune.model import Llama, LlamaConfig, RopeScaling
from minitune.nf4 import NF4Linear
from minitune.precision import DTYPES
from minitune.shards import COMPANIONS, LARGEST_COMPANION, Shards, headers, weight_files

WIDEST, DEEPEST, LARGEST_VOCABULARY = 2**20, 1000, 2**24  # beyond any model, and short of what cannot be counted
TINY = Path(__file__).parent / "tiny"


def load(folder: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> Llama:
    """The model of a folder, or "tiny", with its weights: `model(tokens)` maps (B, T) ids to (B, T, V) logits."""
    folder = find(str(folder))
    with torch.device("meta"):
        model = Llama(read_config(folder))
    check_weights(model, folder)
    model.to(DTYPES[dtype]).requires_grad_(False)
    parallel.materialize(model.modules(), torch.device(device))
    load_base(model, folder)
    return model.eval()


def find(path: str, revision: str = "", weights: bool = True) -> Path:
    """The folder of `model.path`: "tiny", a local folder, or a Hub id, which is downloaded (JSON and tokenizer files
    and, if `weights` are wanted, safetensors)."""
    if path == "tiny":
        return TINY
    if os.path.isdir(path):
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or os.path.exists(path):
        raise UserError(f"model.path: there is no folder {path}, and it is no Hub id (owner/name) either")

    from huggingface_hub import errors, snapshot_download

    patterns = ["*.json", "tokenizer.model", "*.jinja", *["*.safetensors"] * weights]
    try:
        return Path(snapshot_download(path, revision=revision or None, allow_patterns=patterns, ignore_patterns="*/*"))
    except errors.GatedRepoError:
        why = "asks you to accept its licence there first, and for your token in HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"has no revision {revision}"
    except errors.RepositoryNotFoundError:
        why = "has no such model, or shows it only to your token in HF_TOKEN"
    except (OSError, ValueError):  # no connection, in all its forms; or a name that no model can have
        why = "cannot be reached, or cannot have a model of that name"
    raise UserError(f"model.path: there is no folder {path}, and the Hub {why}")


def read_config(folder: Path) -> LlamaConfig:
    """config.json as what it computes, in either spelling of transformers (4: rope_theta and rope_scaling, 5:
    rope_parameters). Raises one UserError with everything that cannot be run exactly."""
    path = inside(folder, "config.json")
    values = read_json(path)
    problems = []

    def whole(key: str, most: int, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            problems.append(f"{key} is {value!r} where a whole number from 1 to {most:,} is needed")
            return 1
        return value

    def number(key: str, default: float) -> float:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            problems.append(f"{key} is {value!r} where a number between 0 and 1 is needed")
            return 1e-6
        return float(value)

    def truth(key: str) -> bool:
        value = values.get(key) or False
        if not isinstance(value, bool):
            problems.append(f"{key} is {value!r} where true or false is needed")
        return bool(value)

    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type {values.get('model_type')!r} is not supported; minitune runs 'llama'")
    refusals = {
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "attention_dropout": (values.get("attention_dropout") or 0, 0),
        "partial_rotary_factor": (values.get("partial_rotary_factor") or 1, 1),
        "quantization_config": (values.get("quantization_config"), None),
        "sliding_window": (values.get("sliding_window") if values.get("use_sliding_window", True) else None, None),
    }
    problems += [f"{key} = {is_!r} is not supported" for key, (is_, must) in refusals.items() if is_ != must]

    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        problems.append(f"layer_types = {layer_types!r} is not supported")

    heads = whole("num_attention_heads", WIDEST)
    hidden = whole("hidden_size", WIDEST)
    kv_heads = whole("num_key_value_heads", WIDEST, heads)
    if heads % kv_heads:
        problems.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if values.get("head_dim") is None and hidden % heads:
        problems.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim")
    head_dim = whole("head_dim", WIDEST, max(hidden // heads, 1))
    if head_dim % 2:
        problems.append(f"head_dim {head_dim} is odd")
    theta, scaling, rope_problems = read_rope(values)
    config = LlamaConfig(
        vocab_size=whole("vocab_size", LARGEST_VOCABULARY),
        hidden_size=hidden,
        intermediate_size=whole("intermediate_size", WIDEST),
        num_hidden_layers=whole("num_hidden_layers", DEEPEST),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=whole("max_position_embeddings", 2**31 - 1, 2048),
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=truth("attention_bias"),
        mlp_bias=truth("mlp_bias"),
        tie_word_embeddings=truth("tie_word_embeddings"),
    )
    problems += rope_problems
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return config


def check_fits(config: LlamaConfig, max_seq_len: int, vocab_size: int) -> None:
    """Refuse rows longer than the model's positions, and a tokenizer with more ids than the model has rows for."""
    if max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"data.max_seq_len: {max_seq_len} is more than the model's {config.max_position_embeddings} positions; "
            f"set it to at most that"
        )
    if vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {vocab_size - 1}, but the model knows only {config.vocab_size} tokens; "
            "they do not belong together"
        )


def read_rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None, list[str]]:
    """Theta and scaling from either spelling, and what is wrong with them."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if not all(isinstance(rope, dict | None) for rope in (new, old)):
        return 1.0, None, ["rope_parameters and rope_scaling must be objects"]
    if new and old and new != old:
        return 1.0, None, ["rope is given twice, as rope_parameters and another rope_scaling"]
    rope = new or old or {}
    kind = rope.get("rope_type", rope.get("type", "default" if not rope.keys() - {"rope_theta"} else None))
    theta = rope.get("rope_theta", values.get("rope_theta") or 10000.0)
    if values.get("rope_theta") not in (None, theta):
        return 1.0, None, [f"rope_theta is given twice, as {values['rope_theta']!r} and {theta!r}"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e12:
        return 1.0, None, [f"rope_theta is {theta!r}"]
    if rope.get("partial_rotary_factor", 1) not in (None, 1):
        return 1.0, None, [f"partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported"]
    if kind == "default":
        return float(theta), None, []
    if kind not in ("linear", "llama3"):
        return 1.0, None, [f"rope type {kind!r} is not supported; minitune runs default, linear and llama3"]
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[kind]
    wrong = [
        f"rope {key} is {rope.get(key)!r}"
        for key in needed
        if isinstance(rope.get(key), bool) or not isinstance(rope.get(key), int | float) or not 0 < rope[key] < 1e12
    ]
    if kind == "llama3" and not wrong and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        wrong = [f"rope high_freq_factor {rope['high_freq_factor']!r} is not above low_freq_factor"]
    if wrong:
        return 1.0, None, wrong
    return float(theta), RopeScaling(kind, **{key: rope[key] for key in needed}), []


def load_base(model: nn.Module, folder: Path) -> None:
    """Stream the weights of `folder` into a model, tensor by tensor, each to where its layer keeps it (quantizing
    for NF4 layers). The host holds one tensor at a time. Names and shapes are checked before any is read.

    Raises:
        UserError: tensors missing, unexpected or of another shape, all listed; or a folder that cannot be trusted.
    """
    check_weights(model, folder)
    leaves = base_leaves(model)
    with Shards(folder) as shards:
        check_tied(model, shards)
        names = [name for name in shards.names() if name in leaves]
        for name in tqdm(names, desc="loading the base", unit=" tensors", disable=None, leave=False):
            module, attribute = leaves[name]
            four_bits = isinstance(module, NF4Linear) and attribute == "weight"
            storage = module.packed if four_bits else getattr(module, attribute)
            if sharding.is_spread(storage):
                rows = shards.rows(name, sharding.own_rows(storage))
                if four_bits:
                    sharding.quantize_rows(module, rows)
                else:
                    sharding.put_rows(storage, rows)
            elif four_bits:
                module.quantize(shards.tensor(name))
            else:
                with torch.no_grad():
                    storage.copy_(shards.tensor(name))


def base_leaves(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Hugging Face's name of each weight of the base -> the module that keeps it now, and under which name.

    Adapters keep the module they wrap as `base`, which is left out of the name; their own parameters do not count.
    """
    leaves = {}
    for path, module in model.named_modules():
        prefix = "".join(part + "." for part in path.split(".") if part not in ("", "base"))
        if isinstance(module, NF4Linear):
            own = ["weight"] if module.bias is None else ["weight", "bias"]
        elif hasattr(module, "base"):
            own = []
        else:
            own = [name for name, _ in module.named_parameters(recurse=False)]
        leaves |= {prefix + name: (module, name) for name in own}
    if model.config.tie_word_embeddings:
        del leaves["lm_head.weight"]
    return leaves


def check_weights(model: Llama, folder: Path) -> None:
    """Hold a model, which may still be without memory, to the headers of a folder's files: one UserError with every
    tensor that is missing, unexpected, of another shape or of no float dtype."""
    shapes = {}
    for name, (module, attribute) in base_leaves(model).items():
        if isinstance(module, NF4Linear) and attribute == "weight":
            shapes[name] = (module.out_features, module.in_features)
        else:
            shapes[name] = tuple(getattr(module, attribute).shape)

    said = headers(folder)
    found = set(said)
    ignored = {name for name in found if name.endswith(".rotary_emb.inv_freq")}  # tables that old exports carry
    tied = {"lm_head.weight"} & found if model.config.tie_word_embeddings else set()
    problems = [f"missing {name}" for name in shapes if name not in found]
    problems += [f"unexpected {name}" for name in sorted(found - shapes.keys() - ignored - tied)]
    for name in sorted(found & shapes.keys()):
        if said[name].shape != shapes[name]:
            problems.append(f"{name} is {said[name].shape}, config.json makes it {shapes[name]}")
        elif said[name].dtype not in ("F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {said[name].dtype}; only F32, F16 and BF16 weights are read")
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{folder} does not hold the model of its config.json:\n  {shown}{more}")


def check_tied(model: Llama, shards: Shards) -> None:
    """Refuse a file whose lm_head.weight is not the embedding that config.json says it is."""
    tied = model.config.tie_word_embeddings and "lm_head.weight" in shards.names()
    if tied and not torch.equal(shards.tensor("lm_head.weight"), shards.tensor("model.embed_tokens.weight")):
        raise UserError(
            f"{shards.folder}: config.json ties lm_head to the embedding, yet the file holds another lm_head.weight"
        )


def full_state(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model without adapters under Hugging Face's names, in `dtype`."""
    for name, (module, attribute) in base_leaves(model).items():
        yield name, sharding.whole(getattr(module, attribute)).to(dtype)


def fingerprint(folder: Path) -> dict[str, str]:
    """Digests of what a base is: of its config.json and weights, every byte of them, and of its tokenizer's files."""
    weights = hashlib.sha256(read_bytes(inside(folder, "config.json")))
    for path in weight_files(folder):
        weights.update(f"{path.name} {digests.sha256(path)}".encode())
    tokenizer = hashlib.sha256()
    for name in COMPANIONS:
        if name not in ("config.json", "generation_config.json") and (folder / name).exists():
            tokenizer.update(name.encode() + read_bytes(inside(folder, name), LARGEST_COMPANION))
    return {"the base model": weights.hexdigest(), "the tokenizer": tokenizer.hexdigest()}
