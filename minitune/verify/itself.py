"""The model, packing, accumulation, four bits and merging, each against its reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import peft_format, pretrained, shards
from minitune.attention import Documents
from minitune.config import LINEARS, Config, ModelConfig
from minitune.data.packing import collate
from minitune.merge import MergeError, merged_tensors
from minitune.model import Llama
from minitune.nf4 import NF4Linear
from minitune.verify import small
from minitune.verify.peers import reference
from minitune.verify.table import EXACT, Check, apart, unequal, worst

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, dict[str, Any]] = {  # what differs from small.SHAPE
    "heads alike, as Llama 2": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "grouped queries, theta of Llama 3": {"rope_theta": 500000.0},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope scaled linearly": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope scaled as Llama 3.1": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
}


def weights_of(folder: Path) -> dict[str, Tensor]:
    with shards.Shards(folder) as files:
        return {name: files.tensor(name) for name in files.names()}


# ---- the model -----------------------------------------------------------------------------------------------------


def model_checks(folder: Path, device: torch.device) -> Iterator[Check]:
    for number, (name, changes) in enumerate(SHAPES.items()):
        base = small.base(folder / f"shape-{number}", vocab_size=2048, **changes)
        yield Check(
            f"{name}: logits, gradients", "transformers", EXACT, partial(model, base, device), ("transformers",)
        )
    yield Check(
        "summed loss over a part of the tokens", "transformers", EXACT, partial(loss, base, device), ("transformers",)
    )


def tokens_and_positions(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (2, 40); positions (2, 40) far out, one row in sequence and one with gaps: attention sees distances alone,
    so only gaps tell what far positions do."""
    gaps = torch.randint(1, 40, (40,)).cumsum(0)
    positions = 100 + torch.stack((torch.arange(40), gaps - gaps[0]))
    return torch.randint(3, 2048, (2, 40)).to(device), positions.to(device)


def model(base: Path, device: torch.device) -> tuple[float, str]:
    ours, theirs = pretrained.load(base, device=device), reference(base, device=device)
    tokens, positions = tokens_and_positions(device)
    everyone = torch.ones_like(tokens)  # without it transformers takes a gap for the start of another document
    weight = torch.randn(*tokens.shape, 2048).to(device)

    def outcome(of: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
        (logits * weight).sum().backward()
        return {"logits": logits.detach()} | {name: p.grad for name, p in of.named_parameters()}

    found = outcome(ours, ours.requires_grad_(True)(tokens, positions))
    return worst(found, outcome(theirs, theirs(tokens, position_ids=positions, attention_mask=everyone).logits))


def loss(base: Path, device: torch.device) -> float:
    tokens, _ = tokens_and_positions(device)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = labels[0, 3:9] = -100
    ours = pretrained.load(base, device=device)(tokens, labels=labels)
    mean = reference(base, device=device)(tokens, labels=labels.roll(1, dims=1)).loss  # it shifts by itself
    return apart(ours, mean * (labels != -100).sum())


# ---- packing and accumulation --------------------------------------------------------------------------------------

ROWS = [[7, 5, 12, 1], [1, 23, 1], [25]]  # lengths of the documents of each row
ENDS = Documents.of([length for row in ROWS for length in row]).ends.tolist()


def packing_checks(folder: Path, device: torch.device) -> Iterator[Check]:
    base = small.base(folder / "packing", **SHAPES["rope scaled as Llama 3.1"])
    cfg = small.recipe(base)
    yield Check("packed rows: logits, gradients", "each document alone", EXACT, partial(packed, cfg, device))
    yield Check("documents that see another one change", "none, bit for bit", 0, partial(seen, cfg, device))
    for method in ("lora", "full"):
        one = replace(cfg, method=method)
        for size in (1, 2):
            what = f"{len(small.LENGTHS) // size} micro-batches, {method}: gradients"
            yield Check(what, "one batch", EXACT, partial(accumulated, one, size, device))


def packed_rows(device: torch.device) -> tuple[Tensor, Tensor, Documents]:
    """Tokens (3, 25), positions (3, 25) and documents, as packing.py makes them."""
    corpus, numbers = small.corpus([n for row in ROWS for n in row], 2048), iter(range(100))
    batch = collate(corpus, [[next(numbers) for _ in row] for row in ROWS], 25, 2).to(device)
    return batch.tokens, batch.positions, batch.documents


def packed(cfg: Config, device: torch.device) -> tuple[float, str]:
    ours, (tokens, positions, documents) = small.built(cfg, device).requires_grad_(True), packed_rows(device)
    weight = torch.randn(75, 2048).to(device)

    def outcome(logits: Tensor) -> dict[str, Tensor | None]:
        ours.zero_grad()
        (logits * weight).sum().backward()
        return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in ours.named_parameters()}

    together = outcome(ours(tokens, positions, documents).flatten(0, 1))
    return worst(together, outcome(torch.cat([ours(tokens.reshape(1, -1)[:, a:b])[0] for a, b in pairwise(ENDS)])))


@torch.no_grad()
def seen(cfg: Config, device: torch.device) -> tuple[float, str]:
    """How many logits of other documents change at all when all tokens of one document do."""
    ours, (tokens, positions, documents) = small.built(cfg, device), packed_rows(device)
    before, count, note = ours(tokens, positions, documents).flatten(0, 1), 0, ""
    for changed, (a, b) in enumerate(pairwise(ENDS)):
        other = tokens.clone().flatten()
        other[a:b] = (other[a:b] + 7) % 2048
        differs = (ours(other.view_as(tokens), positions, documents).flatten(0, 1) != before).any(1)
        assert differs[a:b].all(), f"document {changed} has other tokens and the same logits"
        if others := int(differs.sum()) - (b - a):
            count, note = count + others, f"when document {changed} does"
    return float(count), note


def accumulated(cfg: Config, size: int, device: torch.device) -> tuple[float, str]:
    steps = []
    for rows in (size, len(small.LENGTHS)):
        ours = small.built(cfg, device)
        steps.append(small.step_gradients(ours, cfg, small.step_batches(2048, rows, device)))
    return worst(*steps)


# ---- four bits -----------------------------------------------------------------------------------------------------


def nf4_checks(device: torch.device) -> Iterator[Check]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Check(
            f"NF4 of {name}: bytes and scales", "bitsandbytes, bit for bit", 0, partial(nf4_bytes, dtype, device)
        )
        yield Check(f"NF4 of {name}: made dense", "bitsandbytes, bit for bit", 0, partial(nf4_dense, dtype, device))
    product = "a linear of the dense weight"
    yield Check("NF4: product and gradient", product, EXACT, partial(nf4_product, device))


def four_bits(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[NF4Linear, Tensor]:
    """A linear, and the weight that it was made of: blocks of very different scales, and one of zeros."""
    weight = torch.randn(shape) * 0.02 * torch.rand(shape[0], 1).exp()
    weight[0, 3], weight[-1, :64] = 1.5, 0
    linear = NF4Linear(shape[1], shape[0], False, dtype).to(device)
    weight = weight.to(device, dtype)
    linear.quantize(weight)
    return linear, weight


def nf4_bytes(dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    import bitsandbytes.functional as bnb

    ours, theirs = {}, {}
    for shape in ((33, 192), (300, 64), (129, 256)):  # the last two have several blocks of scales
        linear, weight = four_bits(shape, dtype, device)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        storage = {"packed": packed, "absmax": state.absmax, "nested_absmax": state.state2.absmax}
        storage |= {"nested_offset": state.offset, "nested_levels": state.state2.code}
        ours |= {f"{name} {shape}": getattr(linear, name).detach().flatten() for name in storage}
        theirs |= {f"{name} {shape}": tensor.flatten() for name, tensor in storage.items()}
    return unequal(ours, theirs)


def nf4_dense(dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    import bitsandbytes.functional as bnb

    ours, theirs = {}, {}
    for shape in ((33, 192), (300, 64), (129, 256)):
        linear, weight = four_bits(shape, dtype, device)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        theirs[f"{shape}"] = theirs[f"{shape}, in place"] = bnb.dequantize_4bit(packed, state)
        ours[f"{shape}"] = linear.dense_weight()
        ours[f"{shape}, in place"] = linear.dense_weight(torch.empty_like(weight))
    return unequal(ours, theirs)


def nf4_product(device: torch.device) -> tuple[float, str]:
    linear, _ = four_bits((33, 192), torch.float32, device)
    x, gradient = torch.randn(5, 192).to(device), torch.randn(5, 33).to(device)
    found = []
    for product in (linear, lambda x: F.linear(x, linear.dense_weight())):
        leaf = x.clone().requires_grad_()
        y = product(leaf)
        y.backward(gradient)
        found.append({"product": y.detach(), "gradient": leaf.grad})
    return worst(*found)


# ---- merging -------------------------------------------------------------------------------------------------------


def merge_checks(folder: Path, device: torch.device) -> Iterator[Check]:
    base = small.base(folder / "merging")
    for dtype in ("float32", "bfloat16", "float16"):
        once = partial(rounded_once, base, dtype, folder / f"merged-{dtype}")
        yield Check(f"merged to {dtype}: error in ulps", "the sum in fp64", 0.5, once)
    for method in ("lora", "qlora"):
        there = partial(merged_in_transformers, base, method, folder / f"there-{method}", device)
        what = f"merged, {method}: logits in transformers"
        yield Check(what, "the live model", EXACT, there, ("transformers",))


def merged(base: Path, method: str, dtype: str | None, out: Path) -> tuple[Llama, Path]:
    """A live model on the CPU and the folder that it is merged into; its adapter's folder is beside that."""
    cfg = small.recipe(base, method=method)
    live = small.built(cfg, torch.device("cpu"))
    peft_format.save(out.with_name(f"{out.name}-adapter"), live, cfg.lora, ModelConfig(path=str(base)))
    with shards.Shards(base) as weights:
        shards.save(out, merged_tensors(cfg, live, weights, "dequantized", dtype, MergeError()), like=base)
    return live, out


def rounded_once(base: Path, dtype: str, out: Path) -> tuple[float, str]:
    """The product is summed here from the adapter's file by itself."""
    from safetensors.torch import load_file

    merged(base, "lora", dtype, out)
    before, after = weights_of(base), weights_of(out)
    adapter = load_file(out.with_name(f"{out.name}-adapter") / peft_format.WEIGHTS)
    found, changed = (0.0, ""), 0
    for name, tensor in after.items():
        exact = before[name].double()
        A = adapter.get(f"{peft_format.PREFIX}{name.removesuffix('weight')}lora_A.weight")
        if A is not None:
            B = adapter[f"{peft_format.PREFIX}{name.removesuffix('weight')}lora_B.weight"]
            exact, changed = exact + small.ALPHA / small.R * (B.double() @ A.double()), changed + 1
        found = max(found, (((tensor.double() - exact).abs() / ulp(exact, tensor.dtype)).max().item(), name))
    assert changed == 2 * len(LINEARS), f"{changed} weights have an adapter"
    return found[0] * (1 - 1e-9), found[1]  # fp64 itself rounds


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` around each number of an fp64 tensor."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact).exponent - 1  # 2^exponent <= |x|
    least = torch.frexp(torch.tensor(info.tiny, dtype=torch.float64)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps), exponent.clamp(min=least))


@torch.no_grad()
def merged_in_transformers(base: Path, method: str, out: Path, device: torch.device) -> float:
    live, folder = merged(base, method, None, out)
    tokens = torch.randint(3, 2048, (3, 31))
    logits = reference(folder, device=device)(input_ids=tokens.to(device)).logits
    bare = reference(base)(input_ids=tokens).logits
    assert apart(live.eval()(tokens), bare) > 1e-3, "the adapter does not show in the logits"
    return apart(logits, live(tokens))
