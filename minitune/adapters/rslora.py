"""rsLoRA, https://arxiv.org/abs/2312.03732: LoRA whose update is scaled by alpha / sqrt(r), not alpha / r.

With alpha / r the update, and what is learned in it, gets smaller as r grows; with alpha / sqrt(r) it stays the same
size, so that a larger rank can be of use.
"""

from typing import ClassVar

from torch import nn

from minitune.adapters.lora import LoRALinear
from minitune.config import LoRAConfig


class RsLoRALinear(LoRALinear):
    PEFT_CONFIG: ClassVar = {"use_rslora": True}

    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.scaling = cfg.alpha / cfg.r**0.5
