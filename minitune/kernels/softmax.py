"""Cross-entropy over a piece of logits, and its gradient in their place.

A row is read twice, by one program: once for its largest logit and the sum of exponentials, once to write
softmax - onehot over it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.kernels.launch import fused, jit, tl


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row (N,) fp32 (nats, softmax in fp32); logits (N, V) become its gradient. labels (N,) int64."""
    if not fused(logits):
        return plain_cross_entropy_(logits, labels)
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[(N,)](logits, labels, losses, V, logits.stride(0), 2048, num_warps=8)
    return losses


def plain_cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=1)
    losses = -log_p.gather(1, labels[:, None])[:, 0]
    gradient = log_p.exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    logits.copy_(gradient)
    return losses


@jit
def cross_entropy_kernel(logits, labels, losses, V, row, SIZE: tl.constexpr):
    n = tl.program_id(0)
    at = logits + n.to(tl.int64) * row
    label = tl.load(labels + n)
    right = tl.load(at + label).to(tl.float32)
    columns = tl.arange(0, SIZE)
    high = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, V, SIZE):  # each lane keeps its own running maximum and sum
        x = tl.load(at + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - safe) + tl.exp(x - safe)
        high = higher
    top = tl.max(high, 0)
    log_sum = tl.log(tl.sum(total * tl.exp(high - top), 0))  # of exp(x - top)
    tl.store(losses + n, log_sum - (right - top))
    tl.debug_barrier()
    for start in range(0, V, SIZE):
        real = start + columns < V
        x = tl.load(at + start + columns, mask=real, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - top - log_sum) - tl.where(start + columns == label, 1.0, 0.0)
        tl.store(at + start + columns, p, mask=real)
