"""The model against transformers' LlamaForCausalLM, live: logits and every gradient, and the parts bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import minitune.model
from minitune import parallel, pretrained
from minitune.model import Llama, LlamaConfig, RMSNorm, RopeScaling, rotary_frequencies, rotary_tables, rotate

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# name -> (shape, the rope keys of transformers 5, the rope keys of transformers 4)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama 1 and 2": (
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {},  # the oldest folders say nothing of rope
    ),
    "llama 3": (
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_scaling": None},
    ),
    "head_dim is not hidden / heads": (
        {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"rope_theta": 20000.0},
    ),
    "tied": (
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_theta": 10000.0},
    ),
    "biases": (
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_theta": 10000.0},
    ),
    "rope linear": (
        {},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "rope llama3": (
        {},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "rope llama3 under its oldest key": (
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ),
}
STARTS = (0, 100, 5000)  # the last is beyond every context here


def spell_as_version_4(folder: Path, shape: dict[str, Any], rope: dict[str, Any]) -> None:
    """Put a config.json there as transformers 4 wrote it."""
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "initializer_range": 0.02}
    values |= {"torch_dtype": "float32", "transformers_version": "4.31.0", **shape, **rope}
    if values["num_key_value_heads"] == values["num_attention_heads"]:
        del values["num_key_value_heads"]  # Llama 1 had no such key
    (folder / "config.json").write_text(json.dumps(values))


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def draw_tokens(start: int, length: int = 40, vocab: int = 101) -> tuple[Tensor, Tensor]:
    """Tokens (2, T) and positions (2, T): one row in sequence, one with gaps.

    Attention sees distances alone: only a row with gaps tells what far positions do.
    """
    tokens = torch.randint(0, vocab, (2, length))
    gaps = torch.randint(1, 40, (length,)).cumsum(0)
    return tokens, start + torch.stack((torch.arange(length), gaps - gaps[0]))


def run(model: nn.Module, logits: Callable[[], Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of their sum weighted by `weight`: for the embedded inputs and every parameter."""
    model.requires_grad_(True)
    model.zero_grad()
    found = {}
    inputs = model.model.embed_tokens.register_forward_hook(lambda module, args, out: found.update(inputs=out))
    found["logits"] = logits()
    inputs.remove()
    found["inputs"].retain_grad()
    (found["logits"] * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": found["logits"].detach(), "inputs": found["inputs"].grad, **gradients}


def compare(ours: Llama, theirs: nn.Module, start: int) -> dict[str, float]:
    """Errors of the logits, the gradient of the inputs and that of each weight."""
    tokens, positions = draw_tokens(start)
    weight = torch.randn(*tokens.shape, 101)
    everyone = torch.ones_like(tokens)  # without it transformers takes a gap for the start of another document
    a = run(ours, lambda: ours(tokens, positions), weight)
    b = run(theirs, lambda: theirs(tokens, position_ids=positions, attention_mask=everyone).logits, weight)
    assert a.keys() == b.keys()
    return {name: error(a[name], b[name]) for name in a}


@pytest.mark.parametrize("spelling", ["version 5", "version 4"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_are_transformers_s(case: str, spelling: str, save_llama: Any, shape: Any) -> None:
    changes, rope_5, rope_4 = CASES[case]
    folder, theirs = save_llama(**changes, **rope_5)
    if spelling == "version 4":
        spell_as_version_4(folder, shape | changes, rope_4)
    keys = json.loads((folder / "config.json").read_text()).keys()
    assert ("rope_parameters" in keys, "dtype" in keys) == (spelling == "version 5",) * 2

    ours = pretrained.load(folder)
    for start in STARTS:
        errors = compare(ours, theirs, start)
        assert max(errors.values()) < 1e-5, (start, max(errors.items(), key=lambda item: item[1]))


def test_positions_count_from_zero_when_none_are_given(save_llama: Any) -> None:
    folder, theirs = save_llama()
    tokens, _ = draw_tokens(0)
    assert error(pretrained.load(folder)(tokens), theirs(tokens).logits.detach()) < 1e-5


def test_the_loss_is_transformers_s(save_llama: Any) -> None:
    folder, theirs = save_llama()
    tokens, _ = draw_tokens(0)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[0, 3:9] = -100
    ours = pretrained.load(folder)(tokens, labels=labels)
    mean = theirs(tokens, labels=labels.roll(1, dims=1)).loss  # it shifts by itself
    assert ours.item() == pytest.approx(mean.item() * (labels != -100).sum().item(), rel=1e-6)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def other_way_round(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x, cos, -sin)


def half_as_far(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_tables(config, positions // 2)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("rotate", interleaved), ("rotate", other_way_round), ("rotary_tables", half_as_far)],
    ids=["interleaved", "the other way round", "half as far"],
)
def test_a_wrong_rotation_would_be_caught(
    name: str, wrong: Callable[..., Any], save_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, theirs = save_llama()
    ours = pretrained.load(folder)
    assert compare(ours, theirs, 0)["logits"] < 1e-5
    monkeypatch.setattr(minitune.model, name, wrong)
    errors = compare(ours, theirs, 0)
    assert errors["logits"] > 1e-2
    assert errors["inputs"] > 1e-2


@pytest.mark.parametrize(
    "wrong",
    [{"rope_theta": 10001.0}, {"rms_norm_eps": 2e-5}, {"rope_scaling": RopeScaling("linear", 1.001)}],
    ids=["theta off by one", "epsilon twice", "scaled by a thousandth"],
)
def test_slightly_wrong_numbers_would_be_caught(wrong: dict[str, Any], save_llama: Any) -> None:
    folder, theirs = save_llama()
    ours = pretrained.load(folder)
    config = replace(ours.config, **wrong)
    ours.model.config = config
    for module in ours.modules():
        if isinstance(module, RMSNorm):
            module.eps = config.rms_norm_eps
    assert compare(ours, theirs, 0)["logits"] > 1e-5


def test_ignoring_the_scaling_shows_only_far_away(save_llama: Any) -> None:
    """Why the comparison above has gaps between positions: with Llama 3.1's numbers a short prompt tells nothing."""
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder, theirs = save_llama(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **numbers})
    ours = pretrained.load(folder)
    tokens = torch.randint(0, 101, (1, 32))

    def apart(positions: Tensor) -> float:
        them = theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
        return error(ours(tokens, positions), them.detach())

    near, far = torch.arange(32)[None], torch.arange(0, 32000, 1000)[None]
    assert apart(near) < 1e-5
    assert apart(far) < 1e-5
    ours.model.config = replace(ours.config, rope_scaling=None)
    assert apart(near) < 1e-2
    assert apart(far) > 1e-1


# The parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_transformers_s_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs, x = norms(dtype)
    assert torch.equal(ours(x), theirs(x))


def test_multiplying_before_the_cast_would_be_caught() -> None:
    ours, theirs, x = norms(torch.bfloat16)
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + ours.eps)
    early = (ours.weight.float() * y).to(torch.bfloat16)
    differing = (early != theirs(x)).float().mean().item()
    assert differing > 0.1


def norms(dtype: torch.dtype) -> tuple[RMSNorm, nn.Module, Tensor]:
    ours, theirs = RMSNorm(96, 1e-5), LlamaRMSNorm(96, 1e-5)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        theirs.weight.copy_(ours.weight)
    scales = 10.0 ** torch.linspace(-4, 3, 50)[:, None, None]  # below and above what epsilon matters to
    return ours.to(dtype), theirs.to(dtype), (torch.randn(50, 7, 96) * scales).to(dtype)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3},
        {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "original_max_position_embeddings": 8192},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,  # Llama 3.2
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=["llama 2", "llama 3", "linear", "llama3 over 64", "llama 3.1", "llama 3.2"],
)
def test_frequencies_are_transformers_s(rope: dict[str, Any], head_dim: int) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=dict(rope)
    )
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    theirs, _ = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], default)(config, device="cpu")
    ours = rotary_frequencies(rope_config(rope, head_dim), torch.device("cpu"))
    assert ours.dtype == torch.float32
    assert ((ours - theirs).abs() / theirs).max() <= 1e-7


def test_all_three_bands_of_llama3_occur_here() -> None:
    """Kept, stretched by the factor, and between: a test that met only one of them would prove little."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}
    scaled = rotary_frequencies(rope_config(rope, 16), torch.device("cpu"))
    plain = rotary_frequencies(rope_config({"rope_type": "default", "rope_theta": 10000.0}, 16), torch.device("cpu"))
    ratio = plain / scaled
    assert (ratio == 1).any()
    assert (ratio == 8).any()
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


def rope_config(rope: dict[str, Any], head_dim: int) -> LlamaConfig:
    theta, scaling, problems = pretrained.read_rope({"rope_parameters": rope})
    assert not problems
    return LlamaConfig(11, 4 * head_dim, 8, 1, 4, 4, head_dim, 131072, 1e-5, theta, scaling)


def test_tables_are_fp32_whatever_the_model_s_dtype(save_llama: Any) -> None:
    folder, _ = save_llama(max_position_embeddings=8192)
    model = pretrained.load(folder).to(torch.bfloat16)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.extend(args[1:3]))
    model(torch.tensor([[0]]), torch.tensor([[8191]]))

    exact = torch.tensor([8191 * 10000.0 ** (-2 * i / 16) for i in range(8)], dtype=torch.float64)
    for table, reference in zip(seen, (exact.cos(), exact.sin()), strict=True):
        assert table.dtype == torch.float32
        assert (table.double().flatten() - reference).abs().max() <= 1e-3

    # In bf16 the same table is worthless:
    in_bf16 = rotary_frequencies(model.config, torch.device("cpu")).bfloat16() * torch.tensor(8191.0).bfloat16()
    assert (in_bf16.double().cos() - exact.cos()).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_a_bf16_model_is_as_close_to_fp64_as_transformers_s(tied: bool, save_llama: Any) -> None:
    """In bf16 roundings differ (rotation is fp32 here), so both are measured against the same weights in fp64."""
    folder, theirs = save_llama(dtype=torch.bfloat16, tie_word_embeddings=tied)
    ours = pretrained.load(folder, dtype="bfloat16")
    tokens, _ = draw_tokens(0)
    them = theirs(tokens).logits.detach()
    exact = theirs.double()(tokens).logits.detach()
    assert ours(tokens).dtype == torch.bfloat16
    assert error(ours(tokens), exact) < 1.5 * error(them, exact)


# What the model promises to those who compose with it


def test_nothing_is_made_that_a_checkpoint_does_not_fill(save_llama: Any) -> None:
    folder, theirs = save_llama(attention_bias=True, mlp_bias=True)
    with torch.device("meta"):
        model = Llama(pretrained.read_config(folder))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    assert model.state_dict().keys() == theirs.state_dict().keys()


def test_every_product_is_a_linear_called_as_a_module(save_llama: Any) -> None:
    """An adapter stands in for a linear: one that is not called, or whose weight is read past it, would be skipped."""
    folder, _ = save_llama(num_hidden_layers=1)
    model = pretrained.load(folder)
    called = set()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, out, name=name: called.add(name))
    model(torch.zeros(1, 3, dtype=torch.int64))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 8
    assert linears <= called
    assert "model.layers.0.self_attn.core" in called
    model(torch.zeros(1, 3, dtype=torch.int64), labels=torch.zeros(1, 3, dtype=torch.int64))
    assert "loss" in called


@pytest.mark.parametrize("tied", [False, True])
def test_materialize_keeps_what_is_shared_shared(tied: bool, save_llama: Any) -> None:
    folder, _ = save_llama(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Llama(pretrained.read_config(folder))
    model.to(torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(False)
    parallel.materialize(model.modules(), torch.device("cpu"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad == (name != "model.embed_tokens.weight")


def test_a_first_use_without_gradients_does_not_spoil_the_next(save_llama: Any) -> None:
    """The rotary frequencies are made once and kept: made in inference mode, they must still serve training."""
    folder, theirs = save_llama()
    rotary_frequencies.cache_clear()
    ours = pretrained.load(folder)
    with torch.inference_mode():
        ours(torch.zeros(1, 3, dtype=torch.int64))
    assert max(compare(ours, theirs, 0).values()) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_blocks_give_the_same_gradients(dtype: str, save_llama: Any) -> None:
    folder, _ = save_llama()
    tokens, positions = draw_tokens(0)
    gradients = []
    for recompute in (False, True):
        model = pretrained.load(folder, dtype=dtype).requires_grad_(True)
        if recompute:
            parallel.recompute_blocks(model.layers)
        model(tokens, positions, labels=tokens).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
