"""LoRA on the embedding: a low-rank change of all its rows.

y = E[token] + (alpha / r) B A[:, token]        A (r, V), B (D, r), A = 0 at the start
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.config import LoRAConfig


class LoRAEmbedding(nn.Module):
    """A frozen embedding and its update. As in PEFT, A is what starts at zero, and nothing is dropped."""

    PEFT_NAMES: ClassVar[dict[str, str]] = {
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
    }
    PEFT_CONFIG: ClassVar[dict[str, object]] = {}

    def __init__(self, base: nn.Embedding, cfg: LoRAConfig) -> None:
        super().__init__()
        self.base, self.scaling = base, cfg.alpha / cfg.r
        V, D = base.weight.shape
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_embedding_A = nn.Parameter(torch.empty(cfg.r, V, **like))
        self.lora_embedding_B = nn.Parameter(torch.empty(D, cfg.r, **like))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.lora_embedding_A.zero_()
        self.lora_embedding_B.copy_(torch.randn(self.lora_embedding_B.shape))  # drawn on the CPU, as everywhere

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base(tokens)
        inner = F.embedding(tokens, self.lora_embedding_A.T)  # (B, T, r)
        return (y + self.scaling * F.linear(inner, self.lora_embedding_B)).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """E + (alpha / r) (B A)^T, (V, D)."""
        return weight + self.scaling * (self.lora_embedding_B.to(weight) @ self.lora_embedding_A.to(weight)).T
