"""Summed cross-entropy of the next token, without ever holding all logits.

A row of 2048 tokens over 128,256 words is a gigabyte of fp32 logits. So the head is applied to a few thousand
tokens at a time, and each piece is computed again in the backward pass instead of being kept.
The sum, not the mean: the training loop divides once, by the loss tokens of the whole step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a label that is not to be learned
CHUNK = 2048  # tokens a piece


class TokenLoss(nn.Module):
    """The leaf that turns hidden states into a loss; applied with the head so that it may go piece by piece."""

    def forward(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        """hidden (B, T, D), labels (B, T) with IGNORE where nothing is learned -> fp32 scalar, nats.

        No labels at all give 0, with a zero gradient.
        """
        learned = labels != IGNORE
        hidden, labels = hidden[learned], labels[learned]  # (N, D), (N,): the head skips all other places
        total = torch.zeros((), device=hidden.device)
        for piece, targets in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            if torch.is_grad_enabled():
                total = total + checkpoint(summed_cross_entropy, piece, head, targets, use_reentrant=False)
            else:
                total = total + summed_cross_entropy(piece, head, targets)
        return total


def summed_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """hidden (N, D), labels (N,) -> fp32 scalar; the softmax is taken in fp32."""
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")
