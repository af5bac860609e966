"""Frozen weights in four bits: NormalFloat with nested scales, from QLoRA, https://arxiv.org/abs/2305.14314.

A weight (out, in) is cut into blocks of 64 along its rows. Each block keeps one scale, the largest magnitude in
it, and 64 four-bit indices into 16 levels that fit a normal distribution. The scales are themselves kept in
eight bits, in blocks of 256 with an fp32 scale each, after their mean is taken off: 4.127 bits a weight.

The arithmetic is bitsandbytes' functions; the storage is ours. Row i of `packed` is row i of the weight, as plain
frozen parameters, so a weight moves, saves and shards like any other (bitsandbytes' own `Params4bit` is a tensor
subclass whose scales get lost under FSDP2).
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import surgery
from minitune.errors import UserError
from minitune.kernels import four_bits
from minitune.kernels.launch import fused

# On some CPUs bitsandbytes warns at import that it lacks an inference kernel, one that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb  # noqa: E402

BLOCK = 64  # weights a scale
NESTED_BLOCK = 256  # scales a scale of scales


class NF4Linear(nn.Module):
    """A frozen linear map whose weight is stored in four bits and made dense for each product.

    `dtype` is that of the weight before quantizing and after making it dense; inputs must have it too.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        assert in_features % BLOCK == 0, (in_features, BLOCK)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        scales = out_features * in_features // BLOCK

        def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        self.packed = frozen(out_features, in_features // 2, dtype=torch.uint8)  # two indices a byte
        self.absmax = frozen(out_features, in_features // BLOCK, dtype=torch.uint8)  # index of each scale
        self.nested_absmax = frozen(-(-scales // NESTED_BLOCK), dtype=torch.float32)
        self.nested_offset = frozen(1, dtype=torch.float32)  # the mean of the scales
        self.register_buffer("nested_levels", None, persistent=False)  # a constant of the format
        self.bias = frozen(out_features, dtype=dtype) if bias else None

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> None:
        """Fill the storage from a dense weight (out, in), on the device where the storage lies."""
        weight = weight.to(self.packed.device, self.dtype).contiguous()
        packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        self.packed.copy_(packed.view_as(self.packed))
        self.absmax.copy_(state.absmax.view_as(self.absmax))
        self.nested_absmax.copy_(state.state2.absmax)
        self.nested_offset.copy_(state.offset)
        self.storage()  # makes the constant now, so that no compiler meets the making of it

    def storage(self) -> tuple[Tensor, ...]:
        """What `dequantize` makes the weight from."""
        if self.nested_levels is None:
            self.nested_levels = nested_levels(self.packed.device)
        packed, absmax = as_bytes(self.packed), as_bytes(self.absmax)
        return packed, absmax, self.nested_absmax, self.nested_offset, self.nested_levels

    def dense_weight(self, out: Tensor | None = None) -> Tensor:
        """The weight (out, in) that the four bits stand for, written to `out` where that is given."""
        if out is None:
            return dequantize(*self.storage(), self.dtype)
        if fused(out):
            four_bits.dequantize(*self.storage(), levels(out.device), out)
            return out
        return out.copy_(dequantize(*self.storage(), self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return NF4Product.apply(x, self.bias, self.dtype, *self.storage())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Product(torch.autograd.Function):
    """y = x W^T + b (..., out), with W made dense once in forward and once more in backward, never kept between.

    The plain twin is `F.linear(x, module.dense_weight(), bias)`, which would keep every dense weight until backward.
    """

    @staticmethod
    def forward(ctx, x, bias, dtype, *storage):
        ctx.save_for_backward(*storage)
        ctx.dtype = dtype
        return F.linear(x, dequantize(*storage, dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        weight = dequantize(*ctx.saved_tensors, ctx.dtype)
        return grad @ weight, *[None] * 7


def as_bytes(storage: Tensor) -> Tensor:
    """The same memory as bytes, whatever it is called meanwhile (sharding.py says when it is)."""
    return storage if storage.dtype == torch.uint8 else storage.view(torch.uint8)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A dense weight (rows, in) -> bytes (rows, in/2) and fp32 scales (rows, in/64), row by row."""
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return packed.view(len(weight), -1), state.absmax.view(len(weight), -1)


def nested(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All fp32 scales of a weight, flat -> their own bytes, the scales of these, and their mean."""
    offset = scales.mean()
    absmax, state = bnb.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return absmax, state.absmax, offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    nested_levels: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(out, in/2) bytes and their scales -> the dense weight (out, in) in `dtype`.

    bitsandbytes' own operators, called without its Python functions around them, which a compiler cannot trace.
    """
    out_features, half = packed.shape
    ops = torch.ops.bitsandbytes
    scales = ops.dequantize_blockwise(absmax.view(-1), nested_absmax, nested_levels, NESTED_BLOCK, torch.float32)
    shape = (out_features, 2 * half)
    return ops.dequantize_4bit(packed.view(-1, 1), scales + nested_offset, BLOCK, "nf4", shape, dtype)


@cache
def nested_levels(device: torch.device) -> Tensor:
    """The 256 values that an eight-bit scale can have, before its block's own factor."""
    return bnb.create_dynamic_map().to(device)


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 values that four bits can mean, before the scale of their block."""
    return bnb.get_4bit_type("nf4", device)


def quantize_linears(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Turn every linear of the decoder blocks into an (empty) NF4Linear; embeddings, head and norms stay.

    Raises:
        UserError: an input width that is no multiple of 64.
    """

    def make(linear: nn.Module) -> nn.Module:
        if linear.in_features % BLOCK:
            raise UserError(
                f"method: qlora needs layer widths that are multiples of {BLOCK}, and this model has one of "
                f"{linear.in_features}; set method = 'lora'"
            )
        with torch.device(linear.weight.device):
            return NF4Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype)

    return surgery.replace(model.layers, lambda name, leaf: type(leaf) is nn.Linear, make)
