"""VeRA, https://arxiv.org/abs/2310.11454: random projections that all linears of a model share, and two vectors each.

    y = W x + b * (B (d * (A dropout(x))))      A (r, in), B (out, r) random and frozen; d (r) = 0.1, b (out) = 0
                                                at the start; * is by element

Only d and b train, r + out numbers. A and B are as large as the widest linear needs; each takes the first `in` columns
of A and the first `out` rows of B. There is no alpha: d is what scales.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.config import LoRAConfig

D_INITIAL, PROJECTION_KEY = 0.1, 0  # PEFT's, where nobody says otherwise


class VeRALinear(nn.Module):
    PEFT_NAMES: ClassVar[dict[str, str]] = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    SHARED_NAMES: ClassVar[dict[str, str]] = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
    PEFT_CONFIG: ClassVar[dict[str, object]] = {"peft_type": "VERA", "save_projection": True}
    PEFT_KEYS: ClassVar[dict[str, str]] = {"r": "r", "dropout": "vera_dropout"}
    KEPT_OUTPUTS = 1  # what B gives, for the gradient of b

    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dropout = cfg.dropout
        device = next(base.parameters()).device
        self.vera_lambda_d = nn.Parameter(torch.empty(cfg.r, dtype=torch.float32, device=device))
        self.vera_lambda_b = nn.Parameter(torch.empty(base.out_features, dtype=torch.float32, device=device))
        self.shared = Projections(base.out_features, cfg.r, base.in_features, device)

    @classmethod
    def share(cls, adapters: list[VeRALinear]) -> None:
        """Let all have the same two projections, those of the largest widths."""
        out_features, in_features = (max(getattr(a, f"{way}_features") for a in adapters) for way in ("out", "in"))
        r, device = adapters[0].vera_lambda_d.shape[0], adapters[0].vera_lambda_d.device
        shared = Projections(out_features, r, in_features, device)
        for adapter in adapters:
            adapter.shared = shared

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.shared.draw()
        self.vera_lambda_d.fill_(D_INITIAL)
        self.vera_lambda_b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.projections()
        d, b = self.vera_lambda_d.to(x.dtype), self.vera_lambda_b.to(x.dtype)
        inner = F.linear(F.dropout(x, self.dropout, self.training), A.to(x.dtype))  # (..., r)
        return self.base(x) + F.linear(inner * d, B.to(x.dtype)) * b  # (..., out)

    def projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this linear."""
        return self.shared.A[:, : self.in_features], self.shared.B[: self.out_features]

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + diag(b) B diag(d) A, (out, in)."""
        A, B = (projection.to(weight) for projection in self.projections())
        return weight + self.vera_lambda_b.to(weight)[:, None] * (B @ (self.vera_lambda_d.to(weight)[:, None] * A))


class Projections(nn.Module):
    """A (r, in) and B (out, r) for all linears of a model, fp32."""

    def __init__(self, out_features: int, r: int, in_features: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("A", torch.empty(r, in_features, device=device), persistent=False)
        self.register_buffer("B", torch.empty(out_features, r, device=device), persistent=False)
        self.drawn = False

    @torch.no_grad()
    def draw(self) -> None:
        """Kaiming's uniform, from a seed of their own and in PEFT's order: the same numbers."""
        if self.drawn:
            return
        draw = torch.Generator().manual_seed(PROJECTION_KEY)
        for projection in (self.A, self.B):
            bound = math.sqrt(6 / projection.shape[1])
            projection.copy_(torch.empty(projection.shape).uniform_(-bound, bound, generator=draw))
        self.drawn = True
