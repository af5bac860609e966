"""Rows of the embedding or the head that train, the others staying as they are: PEFT's trainable_token_indices.

For tokens that are new to a model, n rows in place of all V.
"""

from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import sharding
from minitune.config import LoRAConfig


class TokenRows(nn.Module):
    """A frozen embedding or head with other rows (n, D) for some tokens; `twin`'s, where it is a head tied to it."""

    PEFT_CONFIG: ClassVar[dict[str, object]] = {}

    def __init__(
        self, base: nn.Module, cfg: LoRAConfig, tokens: tuple[int, ...], twin: "TokenRows | None" = None
    ) -> None:
        super().__init__()
        self.base, self.tokens = base, tokens
        self.twin = [twin] if twin else []  # in a list, so that it is no part of this module
        self.PEFT_NAMES = {} if twin else {"rows": "token_adapter.trainable_tokens_delta"}
        if twin is None:
            empty = torch.empty(len(tokens), base.weight.shape[1], dtype=torch.float32, device=base.weight.device)
            self.rows = nn.Parameter(empty)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.twin:
            self.rows.copy_(sharding.whole(self.base.weight)[list(self.tokens)])

    def forward(self, x: Tensor) -> Tensor:
        y, rows = self.base(x), (self.twin[0] if self.twin else self).rows
        tokens, order = table(self.tokens, y.device)
        if x.is_floating_point():  # a head: x (..., D), y (..., V)
            return y.index_copy(-1, tokens, F.linear(x, rows[order].to(x.dtype)))
        place = torch.searchsorted(tokens, x).clamp(max=len(tokens) - 1)  # an embedding: x (B, T), y (B, T, D)
        return torch.where((tokens[place] == x)[..., None], F.embedding(order[place], rows).to(y.dtype), y)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight (V, D) with the rows that were learned."""
        rows = (self.twin[0] if self.twin else self).rows
        return weight.index_copy(0, torch.tensor(self.tokens, device=weight.device), rows.to(weight))


@cache
def table(tokens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens in order (n,), and which row each of them has (n,)."""
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    return torch.tensor([tokens[i] for i in order], device=device), torch.tensor(order, device=device)
