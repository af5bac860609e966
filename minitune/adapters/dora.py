"""DoRA, https://arxiv.org/abs/2402.09353: learn the length of each row of a weight apart from its direction.

    y = g (W + s B A) x         g = m / ||W + s B A||, by row (out);   s = alpha / r;   m = ||W|| at the start

A, B and m train. The norm counts as a constant in backward (section 4.3 of the paper). As in PEFT dropout falls on
what is learned, the gain's part included: W x + ((g - 1) W + g s B A) dropout(x), at the cost of a second product.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.adapters.base_weight import weight_here, whole_weight
from minitune.adapters.lora import LoRALinear
from minitune.config import LoRAConfig

PIECE = 2**22  # numbers of a weight that are made fp32 at a time


class DoRALinear(LoRALinear):
    PEFT_NAMES: ClassVar = {**LoRALinear.PEFT_NAMES, "lora_magnitude_vector": "lora_magnitude_vector"}
    PEFT_CONFIG: ClassVar = {"use_dora": True}
    CONSTANT_IN_BACKWARD = ("norms",)
    KEPT_OUTPUTS = 2  # W x and B A x, for the gradient of m

    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.lora_magnitude_vector = nn.Parameter(self.lora_A.new_empty(base.out_features))  # m, (out,)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lora_magnitude_vector.copy_(self.norms(whole_weight(self.base)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        straight = y  # W x, of what is left of x
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
            straight = self.base(x)
        if self.base.bias is not None:
            straight = straight - self.base.bias
        gain = self.lora_magnitude_vector / self.norms(weight_here(self.base))
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)) * self.scaling, self.lora_B.to(x.dtype))
        return y + (gain - 1).to(x.dtype) * straight + gain.to(x.dtype) * update  # g - 1 keeps its digits in bf16

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """||W + s B A|| by row, (out,), in the adapter's dtype; some rows at a time, so that no second copy of the
        weight is made."""
        rows = max(1, PIECE // self.in_features)
        pieces = zip(weight.split(rows), self.lora_B.split(rows), strict=True)
        A, s = self.lora_A, self.scaling
        return torch.cat([torch.addmm(w.to(A.dtype), B, A, alpha=s).norm(dim=1) for w, B in pieces])

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """g (W + s B A), (out, in)."""
        direction = super().merged_weight(weight)
        return direction * (self.lora_magnitude_vector.to(weight) / direction.norm(dim=1))[:, None]
