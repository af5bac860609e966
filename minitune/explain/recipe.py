"""What a recipe trains and what that costs, counted on the meta device: no weights are read.

FLOPs are those of the products (2 a multiplication with its addition) and bytes those that every plain operation of
PyTorch reads and writes. Nothing is measured: fused kernels do the same FLOPs and move fewer bytes.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minitune import adapters, nf4, pretrained
from minitune.config import Config
from minitune.explain import Adapted, Cost, Group, Part, RecipeView
from minitune.masters import BLOCK, SMALL
from minitune.model import Llama, LlamaConfig
from minitune.nf4 import NF4Linear
from minitune.precision import DTYPES

ATTENTION = ("q_proj", "k_proj", "v_proj")


def view(cfg: Config) -> RecipeView:
    """All that is shown of a recipe. Of the model's folder config.json alone is read."""
    config = pretrained.read_config(pretrained.find(cfg.model.path, cfg.model.revision, weights=False))
    model = shaped(config, cfg)
    return RecipeView(
        method=cfg.method,
        model=cfg.model.path,
        tokens=cfg.train.batch_size * cfg.data.max_seq_len,
        groups=list(groups(model)),
        numbers={
            "frozen": sum(numbers(module, False) for module in leaves(model).values()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        bytes=held(model, cfg),
        **costs(model, config, cfg),
    )


def shaped(config: LlamaConfig, cfg: Config) -> Llama:
    """The model of a recipe as its leaves are swapped, without memory and without weights to hold it to."""
    with torch.device("meta"):
        model = Llama(config)
    model.to(DTYPES[cfg.model.dtype])
    if cfg.method == "qlora":
        nf4.quantize_linears(model, DTYPES[cfg.model.dtype])
    if cfg.method != "full":
        adapters.attach(model, cfg.lora)
    return model.train()


# ---- modules -------------------------------------------------------------------------------------------------------


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters of their own, and adapters with all that they wrap, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and (hasattr(module, "base") or next(module.parameters(recurse=False), None) is not None):
            found[name] = module
    if model.config.tie_word_embeddings:
        found.pop("lm_head", None)
    return found


def groups(model: Llama) -> Iterator[Group]:
    """What is outside of the blocks, and equal blocks in a row as one."""
    all_leaves = leaves(model)
    outside = [part(name, module) for name, module in all_leaves.items() if ".layers." not in name]
    yield Group("outside of the blocks", 1, outside)
    blocks = [
        [
            part(name.removeprefix(f"model.layers.{n}."), module)
            for name, module in all_leaves.items()
            if name.startswith(f"model.layers.{n}.")
        ]
        for n in range(len(model.layers))
    ]
    first = 0
    for parts, equal in groupby(blocks):
        count = len(list(equal))
        words = f"block {first}" if count == 1 else f"blocks {first} to {first + count - 1}, each"
        yield Group(words, count, parts)
        first += count


def part(name: str, module: nn.Module) -> Part:
    base = getattr(module, "base", module)
    kind = type(module).__name__ + (f" over {type(base).__name__}" if base is not module else "")
    if hasattr(base, "in_features"):
        shape = f"{base.out_features} x {base.in_features}"
    else:
        shape = " x ".join(map(str, base.weight.shape))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Part(name, kind, shape, numbers(module, trained=False), trained)


def numbers(module: nn.Module, trained: bool) -> int:
    """Numbers that train or do not; of NF4 the weights that the bytes stand for."""
    count = 0
    for inner in module.modules():
        own = [p for p in inner.parameters(recurse=False) if p.requires_grad == trained]
        if isinstance(inner, NF4Linear):
            own = [] if inner.bias is None or trained else [inner.bias]
            count += 0 if trained else inner.in_features * inner.out_features
        count += sum(p.numel() for p in own)
    return count


# ---- bytes ---------------------------------------------------------------------------------------------------------


def held(model: nn.Module, cfg: Config) -> dict[str, dict[str, int]]:
    """Bytes by what they are for and by dtype, on one process; moments as the named optimizer has them on CUDA."""
    kept: dict[str, dict[str, int]] = {"frozen": {}, "trained": {}, "gradients": {}, "moments": {}}

    def add(what: str, dtype: torch.dtype, count: int) -> None:
        name = str(dtype).removeprefix("torch.")
        kept[what][name] = kept[what].get(name, 0) + count * dtype.itemsize

    sums = cfg.method == "full" and cfg.train.gradient_accumulation_steps > 1  # over micro-batches, in fp32
    for parameter in model.parameters():
        count = parameter.numel()
        add("trained" if parameter.requires_grad else "frozen", parameter.dtype, count)
        if not parameter.requires_grad:
            continue
        add("gradients", torch.float32 if sums else parameter.dtype, count)
        if cfg.optim.name == "paged_adamw_8bit" and count >= SMALL:
            add("moments", torch.uint8, 2 * count)
            add("moments", torch.float32, 2 * -(-count // BLOCK))
        else:
            add("moments", torch.float32, 2 * count)
        if parameter.dtype == torch.bfloat16:
            add("moments", torch.int16, count)  # the lower halves of fp32 masters
    return kept


# ---- FLOPs and traffic ---------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Counts what runs within it: FLOPs by PyTorch's own formulas, and bytes read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes_moved = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        if not func.is_view and "empty" not in func._schema.name:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes_moved += sum(tensor.nbytes for tensor in tensors)
        return out


def cost(module: nn.Module, dtype: torch.dtype, tokens: int, gradient: bool) -> Cost:
    """One pass of a linear over so many tokens, a token; `gradient`: whether what it reads needs one."""
    if isinstance(base := getattr(module, "base", module), NF4Linear):
        base.storage()  # makes a constant that no pass makes again
    x = torch.empty(tokens, base.in_features, dtype=dtype, device="meta", requires_grad=gradient)
    with Meter() as there:
        y = module(x)
    with Meter() as back:
        if y.requires_grad:
            torch.autograd.backward(y, torch.empty_like(y))
    for parameter in module.parameters():
        parameter.grad = None
    return Cost(there.flops / tokens, back.flops / tokens, (there.bytes_moved + back.bytes_moved) / tokens)


def costs(model: Llama, config: LlamaConfig, cfg: Config) -> dict[str, object]:
    """FLOPs of a token by part, and each adapted linear beside its base.

    A gradient flows from the end back to the first thing that trains, so what lies before it has no backward pass:
    the first block's q, k and v read an embedding that is frozen, and need no gradient of it.
    """
    dtype, tokens = DTYPES[cfg.model.dtype], cfg.train.batch_size * cfg.data.max_seq_len
    flops = {part: {"forward": 0.0, "backward": 0.0} for part in ("linears", "adapters", "attention", "head")}
    known: dict[tuple[object, ...], Cost] = {}

    def add(part: str, forward: float, backward: float) -> None:
        flops[part]["forward"] += forward
        flops[part]["backward"] += backward

    def counted(module: nn.Module, gradient: bool) -> Cost:
        parameters = tuple((name, p.shape, p.requires_grad) for name, p in module.named_parameters())
        key = (type(module), parameters, gradient)
        if key not in known:
            known[key] = cost(module, dtype, tokens, gradient)
        return known[key]

    adapted: dict[str, Adapted] = {}  # of the last block that has it
    flows = any(p.requires_grad for p in model.model.embed_tokens.parameters())
    H, h, T = config.num_attention_heads, config.head_dim, cfg.data.max_seq_len
    product = 2 * h * H * (T + 1) / 2  # one product of attention, a token: it sees half of a row, and itself
    for layer in model.layers:
        norms = [any(p.requires_grad for p in norm.parameters()) for norm in norms_of(layer)]
        flows = flows or norms[0]
        needed = {}
        for inputs in (ATTENTION, ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            flows = flows or (norms[1] and inputs[0] == "gate_proj")
            trains = flows
            for name in inputs:
                module = getattr(layer.self_attn if name in (*ATTENTION, "o_proj") else layer.mlp, name)
                whole = counted(module, flows)
                base = counted(module.base, flows) if hasattr(module, "base") else whole
                more = Cost(whole.forward - base.forward, whole.backward - base.backward,
                            whole.bytes_moved - base.bytes_moved)  # fmt: skip
                add("linears", base.forward, base.backward)
                add("adapters", more.forward, more.backward)
                needed[name] = flows or any(p.requires_grad for p in module.parameters())
                trains = trains or needed[name]
                if hasattr(module, "base"):
                    adapted[name] = Adapted(name, base, more)
            flows = trains
            if inputs == ATTENTION:
                q, k, v = (needed[name] for name in ATTENTION)
                add("attention", 2 * product, product * (v + (q or k) + q + k))  # dV, dP, dQ, dK
    flows = flows or any(p.requires_grad for p in model.model.norm.parameters())
    head = counted(model.lm_head, flows)
    add("head", head.forward, head.backward)
    return {"flops": flops, "adapted": [*adapted.values()]}


def norms_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer.input_layernorm, layer.post_attention_layernorm
