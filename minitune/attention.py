"""Causal attention over packed documents: a token sees the tokens before it in its own document, no others.

Rows of a batch are laid end to end, and `Documents` says where each document ends; so a document never sees
another on any path below, with or without a flash-attention package. All paths are leaves of the same face:

    forward(q (B, T, H, h), k (B, T, K, h), v (B, T, K, h), documents) -> (B, T, H, h)

with H query heads, K key and value heads (H a multiple of K), h the head width, scores scaled by 1 / sqrt(h).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import surgery
from minitune.errors import UserError


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, as lengths along its rows laid end to end (padding counts as a document)."""

    ends: Tensor  # (N + 1,) int32: 0, then where each document ends; the last is B * T
    longest: int  # tokens; a bound is enough

    @staticmethod
    def of(lengths: list[int], longest: int | None = None) -> Documents:
        """Documents of these lengths, in order; none may cross the end of a row."""
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Documents(ends, longest or max(lengths))

    def to(self, device: torch.device, non_blocking: bool = False) -> Documents:
        return Documents(self.ends.to(device, non_blocking=non_blocking), self.longest)


class CausalAttention(nn.Module):
    """The plain path and the reference: each document by itself through PyTorch's attention.

    Isolation needs no mask here: another document's keys are never in the call.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        B, T, H, h = q.shape
        if documents is None:  # each row is one document
            return attend(q, k, v)
        q, k, v = (x.reshape(1, B * T, -1, h) for x in (q, k, v))
        spans = [slice(start, end) for start, end in pairwise(documents.ends.tolist())]
        parts = [attend(q[:, span], k[:, span], v[:, span]) for span in spans]
        return torch.cat(parts, dim=1).view(B, T, H, h)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each row: q (B, T, H, h), k and v (B, T, K, h) -> (B, T, H, h)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, h), as PyTorch wants it
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
