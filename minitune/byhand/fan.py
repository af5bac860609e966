"""Linears that read the same input, taken together: their products, their adapters, the gradients of both.

The names: `dy` is the gradient of the loss for y; `xa` what went down in an adapter, x A^T; `t` what comes down in the
backward pass, dy B; both carry the adapter's scaling. N = B T tokens, all rows end to end.

    LoRA's gradients:  y = x W^T + s (x A^T) B^T      dx = dy W + t A    dA = t^T x    dB = dy^T xa
    with               xa = s x A^T, t = s dy B
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minitune.adapters.lora import LoRALinear
from minitune.kernels.dropout import Dropout
from minitune.kernels.low_rank import down, gradient, product_fp32, up
from minitune.model import Block
from minitune.nf4 import NF4Linear


class Fan:
    """Linears that read the same input, as one product: q, k and v; o; gate and up; down."""

    def __init__(self, name: str, linears: list[nn.Module], dense: Dense) -> None:
        self.name, self.dense = name, dense
        self.adapters = [linear if isinstance(linear, LoRALinear) else None for linear in linears]
        self.bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
        self.widths = [linear.out_features for linear in linears]
        some = next((adapter for adapter in self.adapters if adapter is not None), None)
        self.rank, self.scaling, self.dropout = (
            (some.lora_A.shape[0], some.scaling, some.dropout) if some else (0, 1.0, 0.0)
        )
        self.A: Tensor | None = None
        self.B: Tensor | None = None

    def trained(self) -> Iterator[nn.Parameter]:
        """Its parameters that train, in the order of `gradients`."""
        for base, adapter in zip(self.bases, self.adapters, strict=True):
            own = [adapter.lora_A, adapter.lora_B] if adapter else [base.weight] if type(base) is nn.Linear else []
            yield from (parameter for parameter in own if parameter.requires_grad)

    def refresh(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Where its adapters' parameters are copied to, in the dtype that multiplies, and the parameters.

        A (n r, in): the ways down, one above the other; B (out, r): the ways up. Where a linear has no adapter among
        others that have, zeros take its place.
        """
        if not self.rank:
            return
        if self.A is None or self.A.device != self.device():
            like = {"dtype": dtype_of(self.bases[0]), "device": self.device()}
            self.A = torch.zeros(len(self.adapters) * self.rank, self.bases[0].in_features, **like)
            self.B = torch.zeros(sum(self.widths), self.rank, **like)
        places = zip(self.adapters, self.A.chunk(len(self.adapters)), self.B.split(self.widths), strict=True)
        for adapter, A, B in places:
            if adapter:
                yield A, adapter.lora_A
                yield B, adapter.lora_B

    def device(self) -> torch.device:
        return next(adapter for adapter in self.adapters if adapter).lora_A.device

    # ---- forward ---------------------------------------------------------------------------------------------------

    def product(self, x: Tensor) -> Tensor:
        """x W^T, side by side: (N, in) -> (N, out)."""
        out = x.new_empty(x.shape[0], sum(self.widths))
        for weight, columns in self.weights(out):
            torch.mm(x, weight.T, out=columns)
        return out

    def down(self, x: Tensor, drop: Dropout | None) -> Tensor | None:
        """What goes down in its adapters, scaled: (N, in) -> (N, n r)."""
        return down(x, self.A, self.scaling, len(self.adapters), drop) if self.rank else None

    def adapted(self, x: Tensor, xa: Tensor | None) -> Tensor:
        """The whole output of a fan of one, (N, in) -> (N, out).

        The adapter's part comes first and the large product adds itself to it, in fp32. The other way round, what an
        adapter adds to numbers that are bf16 already is lost while it is below half a step of theirs: in the first
        steps of training, most of it.
        """
        return self.product(x) if xa is None else added_to(xa @ self.B.T, x, next(self.weights_alone()))

    def product_but_last(self, x: Tensor, xa: Tensor | None) -> tuple[Tensor, Tensor]:
        """The products of all its linears but the last, side by side, and the whole output of the last."""
        *others, last = self.weights_alone()
        first = x.new_empty(x.shape[0], sum(self.widths[:-1]))
        whole = side_by_side(others)
        pairs = [(whole, first)] if whole is not None else zip(others, first.split(self.widths[:-1], 1), strict=True)
        for weight, columns in pairs:
            torch.mm(x, weight.T, out=columns)
        if xa is None:
            return first, x @ last.T
        return first, added_to(xa[:, -self.rank :] @ self.B[-self.widths[-1] :].T, x, last)

    # ---- backward --------------------------------------------------------------------------------------------------

    def down_back(self, dy: Tensor) -> Tensor | None:
        """t of a fan of one, scaled: (N, out) -> (N, r)."""
        return down(dy, self.B.T, self.scaling) if self.rank else None

    def product_back(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """dy W, added to `out` where that is given: (N, out) -> (N, in)."""
        for weight, columns in self.weights(dy):
            out = torch.mm(columns, weight) if out is None else out.addmm_(columns, weight)
        return out

    def back(self, dy: Tensor, t: Tensor | None, drop: Dropout | None) -> Tensor:
        """The gradient of its input (N, in), the adapters' part first."""
        return self.product_back(dy, None if t is None else up(t, self.A, len(self.adapters), drop))

    def trains_bare(self) -> bool:
        """Whether a weight of its own trains, without an adapter; then its gradient is a product with the input."""
        return any(is_bare(*both) for both in zip(self.bases, self.adapters, strict=True))

    def gradients(
        self,
        x: Tensor | None,
        xa: Tensor | None,
        dy: Tensor,
        t: Tensor | None,
        drop: Dropout | None,
        dA: Tensor | None = None,
        dB: Tensor | None = None,
    ) -> list[Tensor]:
        """Of each parameter of `trained`, from its input x, its output's gradient dy, and what went and came down.

        dA (n r, in), dB (out, r): where a kernel that passes over x or dy has found them already.
        """
        grads, n = [], len(self.adapters)
        if dA is None and any(adapter and adapter.lora_A.requires_grad for adapter in self.adapters):
            dA = gradient(t, x, n, drop)
        for i, (base, adapter) in enumerate(zip(self.bases, self.adapters, strict=True)):
            columns = dy.split(self.widths, dim=1)[i]
            if adapter and adapter.lora_A.requires_grad:
                grads.append(dA.chunk(n)[i])
            if adapter and adapter.lora_B.requires_grad:
                found = None if dB is None else dB.split(self.widths)[i]
                grads.append(product_fp32(columns.T, xa.chunk(n, dim=1)[i]) if found is None else found)
            if is_bare(base, adapter):
                wide = base.weight.grad_dtype != x.dtype
                grads.append(product_fp32(columns.T, x) if wide else columns.T @ x)
        return grads

    # ---- weights ---------------------------------------------------------------------------------------------------

    def weights(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Dense weights, and the columns of y (N, out) that are theirs: one for all where they lie side by side."""
        weights = list(self.weights_alone())
        if (whole := side_by_side(weights)) is not None:
            yield whole, y
        else:
            yield from zip(weights, y.split(self.widths, dim=1), strict=True)

    def weights_alone(self) -> Iterator[Tensor]:
        """The dense weight (out, in) of each linear."""
        if isinstance(self.bases[0], NF4Linear):
            yield from self.dense.of(self).split(self.widths)
        else:
            yield from (base.weight for base in self.bases)


class Dense:
    """Room for dense weights of NF4 linears. Blocks share it, so it holds those of one block at a time; within a
    backward pass, what recomputing made dense is still there for the gradients. Or each has its own, made once."""

    def __init__(self, shared: bool = True) -> None:
        self.shared = shared
        self.rooms: dict[Any, Tensor] = {}
        self.holders: dict[Any, Any] = {}

    def of(self, fan: Fan) -> Tensor:
        """The weights of a fan, one above the other: (out, in)."""
        place = fan.name if self.shared else fan
        holder = (fan, *(base.packed._version for base in fan.bases))
        if place not in self.rooms:
            first = fan.bases[0]
            shape = (sum(fan.widths), first.in_features)
            self.rooms[place] = torch.empty(shape, dtype=first.dtype, device=first.packed.device)
        if self.holders.get(place) != holder:
            for base, rows in zip(fan.bases, self.rooms[place].split(fan.widths), strict=True):
                base.dense_weight(out=rows)
            self.holders[place] = holder
        return self.rooms[place]


@torch.no_grad()
def lay_side_by_side(block: Block) -> None:
    """Give the linears that read the same input one piece of memory, so that one product serves them."""
    attention, mlp = block.self_attn, block.mlp
    for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        weights = [getattr(linear, "base", linear).weight for linear in linears]
        room, start = torch.cat(weights), 0
        for weight in weights:
            weight.data = room[start : start + len(weight)]
            start += len(weight)


def side_by_side(weights: list[Tensor]) -> Tensor | None:
    """Weights that follow each other in one piece of memory as one (out, in), or None."""
    room, end = weights[0].untyped_storage().data_ptr(), weights[0].data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != room or weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride())


def added_to(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T, in the place of y; summed in fp32, rounded once."""
    return y.addmm_(x, weight.T)


def is_bare(base: nn.Module, adapter: LoRALinear | None) -> bool:
    """Whether the weight itself trains."""
    return adapter is None and type(base) is nn.Linear and base.weight.requires_grad


def dtype_of(base: nn.Module) -> torch.dtype:
    return base.dtype if isinstance(base, NF4Linear) else base.weight.dtype
