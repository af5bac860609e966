"""A module that trains as it is, beside adapters elsewhere: PEFT's modules_to_save.

The weights that train are an fp32 copy, cast to the base's dtype where they are used; the base's own stay as they are.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minitune import sharding
from minitune.config import LoRAConfig


class TrainedCopy(nn.Module):
    """A linear, an embedding or a norm with weights of its own; `twin` is the copy whose weight it shares, if any."""

    PEFT_CONFIG: ClassVar[dict[str, object]] = {}

    def __init__(self, base: nn.Module, cfg: LoRAConfig, twin: "TrainedCopy | None" = None) -> None:
        super().__init__()
        self.base = base
        self.twin = [twin] if twin else []  # in a list, so that it is no part of this module
        self.PEFT_NAMES = {name: name for name, _ in base.named_parameters()}
        for name, parameter in base.named_parameters():
            if twin is None:
                setattr(self, name, nn.Parameter(torch.empty_like(parameter, dtype=torch.float32)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            parameter.copy_(sharding.whole(getattr(self.base, name)))

    def forward(self, x: Tensor) -> Tensor:
        owner = self.twin[0] if self.twin else self
        weights = {name: getattr(owner, name).to(getattr(self.base, name).dtype) for name in self.PEFT_NAMES}
        return functional_call(self.base, weights, (x,))

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """What was learned, in place of the base's."""
        return (self.twin[0] if self.twin else self).weight.to(weight)
