"""Attention between the halves of a block that runs by hand, and what a block keeps for its backward pass."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from minitune.attention import Documents


class Keep(Enum):
    """What a block keeps between forward and backward, besides its input and what went down in its adapters."""

    ALL = "q k v, attention's output, the sum after it, gate and up"  # nothing is computed again
    QKV = "q k v, attention's output"  # the products after attention are computed again, all but down's
    ATTENTION = "attention's output"  # the products are computed again, all but down's; not attention
    INPUT = "nothing"  # attention is computed again as well


class AttentionPass:
    """Attention between the block's own halves: any core, by way of its own graph.

    What the graph keeps is told apart: q, k and v, which come back from elsewhere, and the rest, which is kept in
    their stead (attention's output and the log-sum-exp of the scores).
    """

    def __init__(self, core: nn.Module, documents: Documents | None, shape: tuple[int, int]) -> None:
        self.core, self.documents, self.shape = core, documents, shape
        self.kept: list[Tensor] = []  # the rest, while it is here

    def forward(self, qkv: tuple[Tensor, ...], keep: Keep | None) -> Tensor:
        """q, k, v (N, heads, h) -> (N, H h). keep None or INPUT: leaves nothing for a backward pass."""
        if keep is Keep.ALL:
            return self.run(qkv)
        if keep in (Keep.QKV, Keep.ATTENTION):
            with torch.autograd.graph.saved_tensors_hooks(self.put, self.get):
                out = self.run(qkv)
            self.keep_output(out)
            self.out = torch.autograd.graph.get_gradient_edge(self.out)  # the node alone, without the tensor
            for x in self.given:
                x.data = x.new_empty(0)  # the graph's inputs stay its inputs, without their memory
            return out
        with torch.no_grad():
            return self.core(*self.rows(qkv), self.documents).reshape(len(qkv[0]), -1)

    def keep_output(self, out: Tensor) -> None:
        """Keep attention's output (N, H h), in the place of the same numbers where the graph saved them, too.

        The graph may see them in another order, as (B, H, T, h) over memory that holds (B, T, H, h); so the output is
        what is kept, and the graph's own order is remembered beside it.
        """
        self.output_at = next((i for i, x in enumerate(self.kept) if same_numbers(x, out)), len(self.kept))
        saved = self.kept[self.output_at : self.output_at + 1]
        self.saved_order = [(x.size(), x.stride()) for x in saved]
        self.kept[self.output_at : self.output_at + 1] = [out]

    def again(self, qkv: tuple[Tensor, ...]) -> Tensor:
        """Attention's output in the backward pass, for q, k, v kept or computed again."""
        if not self.kept:
            return self.run(qkv)
        self.fresh = qkv
        return self.output()

    def output(self) -> Tensor:
        whole = self.kept[self.output_at] if self.kept else self.out.detach()
        return whole.reshape(self.shape[0] * self.shape[1], -1)

    def backward(self, do: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v (N, heads, h)."""
        B, T = self.shape
        do = do.view(B, T, self.heads, -1)
        grads = torch.autograd.grad([self.out], self.given, [do])
        self.out = self.given = self.fresh = None
        self.kept = []
        return tuple(grad.reshape(B * T, *grad.shape[2:]).contiguous() for grad in grads)

    def run(self, qkv: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad():
            self.given, self.heads = [x.detach().requires_grad_() for x in self.rows(qkv)], qkv[0].shape[1]
            self.out = self.core(*self.given, self.documents)
        return self.out.detach().reshape(len(qkv[0]), -1)

    def rows(self, qkv: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.view(*self.shape, *x.shape[1:]) for x in qkv]

    def put(self, x: Tensor) -> Any:
        for i, given in enumerate(self.given):
            if x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
                return "given", i, x.size(), x.stride(), x.storage_offset()
        self.kept.append(x)
        return "kept", len(self.kept) - 1

    def get(self, what: Any) -> Tensor:
        if what[0] == "kept":
            x = self.kept[what[1]]
            return x.as_strided(*self.saved_order[0], x.storage_offset()) if what[1] == self.output_at else x
        _, i, size, stride, offset = what
        return self.fresh[i].as_strided(size, stride, offset)


def same_numbers(x: Tensor, whole: Tensor) -> bool:
    """Whether x is all of `whole`, and nothing else, in the same memory; in whatever order."""
    if x.data_ptr() != whole.data_ptr() or x.dtype != whole.dtype or x.numel() != whole.numel():
        return False
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return whole.is_contiguous() and reach == whole.numel()
