"""PiSSA, https://arxiv.org/abs/2404.02948: train the largest part of a weight, and freeze the rest of it.

    y = (W - s B0 A0) x + s B A dropout(x)      s = alpha / r;   s B0 A0 = U S V^T, the r largest singular values of W
                                                A and B start as A0 and B0

The paper, as PEFT does, writes the rest, W - s B0 A0, over W; what is trained then fits that changed weight alone. Here
W stays as it is, and what is added to it is a LoRA of twice the rank,

    y = W x + s ((B - B0) A + B0 (A - A0)) x,

which is also what is handed over: it fits the base that everybody has. It starts as W exactly, and an update that is
small beside B0 is not lost where A and B are rounded to bf16. The base may be four-bit: then it is the four-bit weight
whose largest part trains. QPiSSA's smaller rounding of the rest is not to be had so: it needs a base of its own.
"""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.adapters.base_weight import leading, whole_weight
from minitune.adapters.lora import LoRALinear
from minitune.config import LoRAConfig

PATTERNS = ("rank_pattern", "alpha_pattern")


class PiSSALinear(LoRALinear):
    PEFT_CONFIG: ClassVar = {"init_lora_weights": "pissa"}

    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.register_buffer("A0", torch.empty_like(self.lora_A, requires_grad=False), persistent=False)
        self.register_buffer("B0", torch.empty_like(self.lora_B, requires_grad=False), persistent=False)

    def start(self) -> tuple[Tensor, Tensor]:
        """A0 (r, in) and B0 (out, r), from the base's weight."""
        U, S, V = leading(whole_weight(self.base), self.lora_A.shape[0])
        root = (S / self.scaling).sqrt()
        return root[:, None] * V.T, U * root

    @torch.no_grad()
    def reset_parameters(self) -> None:
        A, B = self.start()
        for place, value in ((self.A0, A), (self.B0, B), (self.lora_A, A), (self.lora_B, B)):
            place.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        A, B0 = self.lora_A.to(x.dtype), self.B0.to(x.dtype)
        if self.training and self.dropout > 0:  # of the part that trains; the part it replaces keeps all of x
            inner = F.linear(F.dropout(x, self.dropout), A)  # (..., r)
            changed = inner - F.linear(x, self.A0.to(x.dtype))
        else:
            inner, changed = F.linear(x, A), F.linear(x, (self.lora_A - self.A0).to(x.dtype))
        update = F.linear(inner * self.scaling, (self.lora_B - self.B0).to(x.dtype))
        return self.base(x) + update + F.linear(changed * self.scaling, B0)  # (..., out)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s ((B - B0) A + B0 (A - A0)), (out, in)."""
        A, B = self.twice_the_rank()
        return weight + self.scaling * (B.to(weight) @ A.to(weight))

    def twice_the_rank(self) -> tuple[Tensor, Tensor]:
        """A (2r, in) and B (out, 2r) of the LoRA that this is."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        return torch.cat([A, A - self.A0]), torch.cat([B - self.B0, self.B0], dim=1)

    @classmethod
    def exported(cls, cfg: LoRAConfig) -> LoRAConfig:
        patterns = {key: {name: 2 * value for name, value in getattr(cfg, key).items()} for key in PATTERNS}
        return replace(cfg, variant="lora", r=2 * cfg.r, alpha=2 * cfg.alpha, **patterns)

    def export(self) -> dict[str, Tensor]:
        A, B = self.twice_the_rank()
        return {"lora_A.weight": A, "lora_B.weight": B}
