"""Summed cross-entropy of the next token, without ever holding all logits.

A row of 2048 tokens over 128,256 words is a gigabyte of fp32 logits. So the head is applied to a few thousand tokens
at a time. Where the head is a plain linear map, the gradient of a piece is made right after its logits, in their
place; what waits for the backward pass is the gradient of the hidden states, no logits. Places where nothing is
learned never meet the head. The sum, not the mean: the training loop divides once, by the loss tokens of the step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitune.kernels.low_rank import product_fp32
from minitune.kernels.softmax import cross_entropy_

IGNORE = -100  # a label that is not to be learned
CHUNK = 2048  # tokens a piece


class TokenLoss(nn.Module):
    """The leaf that turns hidden states into a loss; applied with the head so that it may go piece by piece."""

    def forward(self, hidden: Tensor, head: nn.Module, labels: Tensor, learned: Tensor | None = None) -> Tensor:
        """hidden (B, T, D), labels (B, T) with IGNORE where nothing is learned -> fp32 scalar, nats.

        learned (N,): the places, counted over B T, whose labels are not IGNORE; looked up where it is not given,
        which has to wait for the device. No labels at all give 0, with a zero gradient.
        """
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        if learned is None:
            learned = (labels != IGNORE).nonzero()[:, 0]
        hidden, labels = hidden.index_select(0, learned), labels.index_select(0, learned)  # (N, D), (N,)
        if is_plain(head):
            return HeadLoss.apply(hidden, head.weight, labels, torch.is_grad_enabled())
        total = torch.zeros((), device=hidden.device)
        for piece, targets in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            if torch.is_grad_enabled():
                total = total + checkpoint(summed_cross_entropy, piece, head, targets, use_reentrant=False)
            else:
                total = total + summed_cross_entropy(piece, head, targets)
        return total


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a linear map and nothing else, whose gradient is known here."""
    return type(head) is nn.Linear and head.bias is None


def summed_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """hidden (N, D), labels (N,) -> fp32 scalar; the softmax is taken in fp32. Any head: autograd does the rest."""
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


class HeadLoss(torch.autograd.Function):
    """The sum of cross-entropies under logits = hidden W^T; `summed_cross_entropy` is its plain twin."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, learning: bool) -> Tensor:
        """hidden (N, D), weight (V, D), labels (N,) -> fp32 scalar. learning: make the gradients too."""
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        logits = hidden.new_empty(min(CHUNK, len(labels)), len(weight))
        dhidden = torch.empty_like(hidden) if learning and ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if learning and ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), CHUNK):
            piece = hidden[start : start + CHUNK]
            gradient = torch.mm(piece, weight.T, out=logits[: len(piece)])
            losses[start : start + CHUNK] = cross_entropy_(gradient, labels[start : start + CHUNK])
            if dhidden is not None:
                torch.mm(gradient, weight, out=dhidden[start : start + CHUNK])
            if dweight is not None:
                dweight += product_fp32(gradient.T, piece)
        ctx.gradients = dhidden, dweight
        return losses.sum()

    @staticmethod
    def backward(ctx, scale: Tensor):
        (dhidden, dweight), ctx.gradients = ctx.gradients, None  # not kept longer than the graph needs them
        return (
            None if dhidden is None else (dhidden * scale).to(dhidden.dtype),
            None if dweight is None else dweight.mul_(scale),
            None,
            None,
        )
