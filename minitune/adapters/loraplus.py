"""LoRA+, https://arxiv.org/abs/2402.12354: LoRA whose B learns faster than its A.

B starts at zero and A does not. In a wide network one rate for both is too small for B or too large for A; the paper
takes that of B some 16 times that of A. What is computed, and its files, are LoRA's.
"""

from torch import nn

from minitune.adapters.lora import LoRALinear
from minitune.config import LoRAConfig


class LoRAPlusLinear(LoRALinear):
    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.learning_rate_ratios = {"lora_B": cfg.loraplus_lr_ratio}
