"""OPLoRA, https://arxiv.org/abs/2510.13003 (AAAI 2026): LoRA that cannot touch what a weight does most.

    y = W x + s (I - U U^T) B A (I - V V^T) dropout(x)      s = alpha / r
                                                            U (out, k), V (in, k): singular vectors of the k largest
                                                            singular values of W; k = r here

Fine-tuning forgets where an update falls into the directions that carry most of a weight. With both sides projected the
k largest singular values of W, and their vectors, are those of W + update as well, exactly. The projections are applied
to A and B, not to the tokens, so a step costs what LoRA's does; and with them applied it is a LoRA of the same rank,
which is what is handed over.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.adapters.base_weight import leading, whole_weight
from minitune.adapters.lora import LoRALinear
from minitune.config import LoRAConfig


class OPLoRALinear(LoRALinear):
    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        like = {"dtype": torch.float32, "device": self.lora_A.device}
        self.register_buffer("U", torch.empty(base.out_features, cfg.r, **like), persistent=False)
        self.register_buffer("V", torch.empty(base.in_features, cfg.r, **like), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        U, _, V = leading(whole_weight(self.base), self.U.shape[1])
        self.U.copy_(U)
        self.V.copy_(V)

    def projected(self) -> tuple[Tensor, Tensor]:
        """A (I - V V^T), (r, in), and (I - U U^T) B, (out, r)."""
        return self.lora_A - self.lora_A @ self.V @ self.V.T, self.lora_B - self.U @ (self.U.T @ self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.projected()
        inner = F.linear(F.dropout(x, self.dropout, self.training), A.to(x.dtype))  # (..., r)
        return self.base(x) + F.linear(inner * self.scaling, B.to(x.dtype))  # (..., out)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s (I - U U^T) B A (I - V V^T), (out, in)."""
        A, B = self.projected()
        return weight + self.scaling * (B.to(weight) @ A.to(weight))

    @classmethod
    def exported(cls, cfg: LoRAConfig) -> LoRAConfig:
        return replace(cfg, variant="lora")

    def export(self) -> dict[str, Tensor]:
        A, B = self.projected()
        return {"lora_A.weight": A.detach(), "lora_B.weight": B.detach()}
