"""LoRA, https://arxiv.org/abs/2106.09685: learn a low-rank change of a frozen weight.

    y = W x + (alpha / r) B A dropout(x)        A (r, in), B (out, r), B = 0 at the start

Only A and B train: r (in + out) numbers in place of in * out. They are kept in fp32 (a bf16 adapter loses most
of its small updates) and cast to the dtype of x where they are used.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.config import LoRAConfig


class LoRALinear(nn.Module):
    """A frozen linear (plain or four-bit; it never asks which) and its low-rank update."""

    PEFT_NAMES: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    PEFT_CONFIG: ClassVar[dict[str, object]] = {}  # plain LoRA says nothing

    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling = cfg.alpha / cfg.r
        self.dropout = cfg.dropout
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(cfg.r, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, cfg.r, dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        A = torch.empty(self.lora_A.shape)  # drawn on the CPU: the same numbers on every device
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as the paper's code and PEFT do: +- 1 / sqrt(in)
        self.lora_A.copy_(A)
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (..., r)
        return self.base(x) + F.linear(inner * self.scaling, self.lora_B.to(x.dtype))  # (..., out)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + (alpha / r) B A, (out, in)."""
        return weight + self.scaling * (self.lora_B.to(weight) @ self.lora_A.to(weight))
