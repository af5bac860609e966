"""Four-bit weights against bitsandbytes' own functions: bytes, dense weights, products and gradients."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import files, nf4, parallel, pretrained
from minitune.errors import UserError
from minitune.model import Llama
from minitune.nf4 import NF4Linear, NF4Product, quantize_linears

SHAPES = [(7, 64), (33, 192), (5, 448), (129, 256), (300, 64)]  # (out, in); the last two have several nested blocks
DTYPES = [torch.float32, torch.bfloat16]
STORAGE = ("packed", "absmax", "nested_absmax", "nested_offset")

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A weight whose blocks have very different scales, and one block of zeros."""
    weight = torch.randn(shape) * 0.02 * torch.rand(shape[0], 1).exp()
    weight[0, 3] = 1.5
    weight[-1, :64] = 0
    return weight.to(dtype)


def quantized(weight: Tensor, bias: bool = False) -> NF4Linear:
    linear = NF4Linear(weight.shape[1], weight.shape[0], bias, weight.dtype)
    linear.quantize(weight)
    if bias:
        linear.bias.data.normal_()
    return linear


def theirs(weight: Tensor) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


@every_shape
@every_dtype
def test_bytes_and_dense_weight_are_bitsandbytes_s(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = drawn(shape, dtype)
    ours, (packed, state) = quantized(weight), theirs(weight)
    assert torch.equal(ours.packed.flatten(), packed.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_offset, state.offset.reshape(1))
    assert torch.equal(ours.nested_levels, state.state2.code)
    assert (state.blocksize, state.state2.blocksize) == (nf4.BLOCK, nf4.NESTED_BLOCK)

    dense = ours.dense_weight()
    assert (dense.shape, dense.dtype) == (shape, dtype)
    assert torch.equal(dense, bnb.dequantize_4bit(packed, state))


@every_dtype
def test_row_i_of_the_storage_is_row_i_of_the_weight(dtype: torch.dtype) -> None:
    weight = drawn((33, 192), dtype)
    before = quantized(weight)
    weight[20] = weight[20].flip(0)  # the same scales in another order, the same mean
    after = quantized(weight)
    changed = (before.packed != after.packed).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [20]


def scale_off_by_one_block(linear: NF4Linear) -> None:
    linear.absmax.data = linear.absmax.flatten().roll(1).view_as(linear.absmax)


def nibbles_swapped(linear: NF4Linear) -> None:
    linear.packed.data = (linear.packed << 4) | (linear.packed >> 4)


def offset_lost(linear: NF4Linear) -> None:
    linear.nested_offset.data.zero_()


@pytest.mark.parametrize("spoil", [scale_off_by_one_block, nibbles_swapped, offset_lost])
@every_dtype
def test_wrong_storage_would_be_caught(spoil: Callable[[NF4Linear], None], dtype: torch.dtype) -> None:
    weight = drawn((33, 192), dtype)
    ours, (packed, state) = quantized(weight), theirs(weight)
    spoil(ours)
    assert not torch.equal(ours.dense_weight(), bnb.dequantize_4bit(packed, state))


@every_shape
@every_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_the_plain_twin_s(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    linear = quantized(drawn(shape, dtype), bias)
    for leading in ((), (5,), (2, 3), (0,)):
        x = torch.randn(*leading, shape[1], dtype=dtype, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        ours, plain = linear(x), F.linear(twin, linear.dense_weight(), linear.bias)
        assert ours.dtype == dtype
        assert torch.equal(ours, plain)

        for gradient in (torch.randn_like(ours), torch.ones(1, dtype=dtype).expand_as(ours)):
            for tensor, result in ((x, ours), (twin, plain)):
                tensor.grad = None
                result.backward(gradient, retain_graph=True)
            tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
            torch.testing.assert_close(x.grad, twin.grad, rtol=tolerance, atol=tolerance)
    assert all(parameter.grad is None for parameter in linear.parameters())


@every_dtype
def test_products_and_gradients_are_linear4bit_s(dtype: torch.dtype) -> None:
    weight = drawn((33, 192), dtype)
    ours = quantized(weight, bias=True)
    reference = bitsandbytes.nn.Linear4bit(192, 33, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    reference.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    reference.bias = nn.Parameter(ours.bias.detach().clone(), requires_grad=False)
    reference = reference.to("cpu")  # quantizes as it moves
    assert torch.equal(reference.weight.data.flatten(), ours.packed.flatten())

    gradient = torch.randn(2, 3, 33, dtype=dtype)
    results = []
    for linear in (ours, reference):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 192, dtype=dtype, requires_grad=True)
        y = linear(x)
        y.backward(gradient)
        results.append((y.detach(), x.grad))
    (ours_y, ours_grad), (reference_y, reference_grad) = results
    assert torch.equal(ours_y, reference_y)  # one rounding: a bias added to a product already in bf16 moves 29 % of it
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(ours_grad, reference_grad, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_the_slope() -> None:
    """As gradcheck, which needs fp64 and so cannot be used here. The map is linear: steps may be long."""
    linear = quantized(drawn((7, 64), torch.float32))
    x = torch.randn(3, 64, requires_grad=True)
    gradient = torch.randn(3, 7)
    linear(x).backward(gradient)
    with torch.no_grad():
        rises = torch.stack([((linear(x + step) - linear(x)) * gradient).sum(1) for step in torch.eye(64)], dim=1)
    torch.testing.assert_close(rises, x.grad, rtol=1e-4, atol=1e-4)


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    linear = quantized(drawn((7, 64), torch.float32))
    assert not linear(torch.randn(3, 64)).requires_grad


def test_a_first_use_without_gradients_does_not_spoil_the_next() -> None:
    """The codebooks are made once and kept: made in inference mode, they must still serve training."""
    linear = quantized(drawn((7, 64), torch.float32))
    nf4.nested_levels.cache_clear()
    with torch.inference_mode():
        linear(torch.randn(3, 64))
    x = torch.randn(3, 64, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dense_weight().sum(0).expand(3, -1))


def test_no_dense_weight_waits_for_the_backward_pass() -> None:
    linear = quantized(drawn((129, 256), torch.float32))
    x = torch.randn(3, 256, requires_grad=True)

    def kept(product: Callable[[], Tensor]) -> set[int]:
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            product()
        return {tensor.numel() for tensor in seen}

    assert 129 * 256 not in kept(lambda: linear(x))
    assert 129 * 256 in kept(lambda: F.linear(x, linear.dense_weight()))  # the plain twin keeps it


class Halved(torch.autograd.Function):
    """NF4Product with a backward pass of its own that is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *storage: Any) -> Tensor:
        return NF4Product.forward(ctx, x, *storage)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *rest = NF4Product.backward(ctx, grad)
        return first / 2, *rest


def test_a_wrong_backward_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "NF4Product", Halved)
    with pytest.raises(AssertionError):
        test_products_and_gradients_are_the_plain_twin_s((7, 64), torch.float32, False)
    with pytest.raises(AssertionError):
        test_products_and_gradients_are_linear4bit_s(torch.float32)
    with pytest.raises(AssertionError):
        test_the_gradient_is_the_slope()


@every_shape
@every_dtype
def test_quantizing_the_dense_weight_again_keeps_every_index(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """All indices come back. Scales need not: their mean is taken anew, over scales rounded to eight bits."""
    linear = quantized(drawn(shape, dtype))
    once, packed = linear.dense_weight(), linear.packed.clone()
    linear.quantize(once)
    assert torch.equal(linear.packed, packed)
    assert (linear.dense_weight() - once).abs().max() <= 0.01 * once.abs().max()


@every_dtype
def test_storage_comes_through_files_and_copies_byte_for_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    linear = quantized(drawn((33, 192), dtype), bias=True)
    assert {name: p.dtype for name, p in linear.named_parameters()} == {
        "packed": torch.uint8,
        "absmax": torch.uint8,
        "nested_absmax": torch.float32,
        "nested_offset": torch.float32,
        "bias": dtype,
    }
    assert not any(parameter.requires_grad for parameter in linear.parameters())

    files.write_tensors(tmp_path / "linear.safetensors", linear.state_dict())
    with torch.device("meta"):
        loaded = NF4Linear(192, 33, True, dtype)
    parallel.materialize([loaded], torch.device("cpu"))
    loaded.load_state_dict(load_file(tmp_path / "linear.safetensors"))
    for other in (loaded, copy.deepcopy(linear), copy.deepcopy(linear).to("cpu")):
        for name, tensor in linear.state_dict().items():
            assert other.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(other.state_dict()[name], tensor), name
        assert torch.equal(other.dense_weight(), linear.dense_weight())


def test_bits_a_weight() -> None:
    with torch.device("meta"):
        linear = NF4Linear(4096, 4096, False, torch.bfloat16)
    stored = sum(parameter.nbytes for parameter in linear.parameters())
    assert 8 * stored / 4096**2 == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_linears_of_the_blocks_alone_are_quantized(tied: bool, save_llama: Any) -> None:
    folder, _ = save_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, head_dim=32)
    with torch.device("meta"):
        model = Llama(pretrained.read_config(folder))
    names = quantize_linears(model, torch.bfloat16)
    assert len(names) == 2 * 7
    four_bit = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert len(four_bit) == len(names)
    assert all(module.bias is not None and module.packed.is_meta for module in four_bit)
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("changes", [{"hidden_size": 96}, {"intermediate_size": 130}, {"head_dim": 10}])
def test_widths_that_do_not_fit_are_refused_by_name(changes: dict[str, int], save_llama: Any) -> None:
    folder, _ = save_llama(**changes)
    with torch.device("meta"):
        model = Llama(pretrained.read_config(folder))
    width = next(iter(changes.values())) * (4 if "head_dim" in changes else 1)
    with pytest.raises(UserError, match=rf"method: qlora needs .* multiples of 64, .* one of {width}; set method"):
        quantize_linears(model, torch.bfloat16)


@every_dtype
def test_a_four_bit_model_is_the_dense_model_of_its_weights(dtype: torch.dtype, save_llama: Any) -> None:
    """The whole model: logits and gradients of the embedding, against a model that holds the dense weights."""
    folder, _ = save_llama()
    name = str(dtype).removeprefix("torch.")
    dense = pretrained.load(folder, dtype=name)
    with torch.device("meta"):
        model = Llama(pretrained.read_config(folder)).to(dtype).requires_grad_(False)
    quantize_linears(model, dtype)
    parallel.materialize(model.modules(), torch.device("cpu"))
    pretrained.load_base(model, folder)
    tokens = torch.randint(0, 101, (2, 17))
    assert not torch.equal(model(tokens), dense(tokens))  # until the dense model takes the rounded weights

    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(path).weight.data = module.dense_weight()
    assert torch.equal(model(tokens), dense(tokens))
    for each in (model, dense):
        each.model.embed_tokens.weight.requires_grad_(True)
        each(tokens, labels=tokens).backward()
    ours, plain = model.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad
    assert (ours - plain).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_takes_it_whole(dtype: torch.dtype) -> None:
    """One graph without a break, forward and backward, with the eager bits."""
    module = quantized(drawn((33, 192), dtype))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 192, dtype=dtype)
    results = []
    for call in (module, compiled):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
