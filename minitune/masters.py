"""bf16 weights that train: their fp32 masters are split in two, the weight itself is the upper half of each number,
and the lower sixteen bits lie with the moments.

At a learning rate of 2e-5 a bf16 weight would round most of its updates away (8 bits of mantissa: a step below 0.4 %
of the weight is lost). Here every update is made in fp32 and nothing is lost, and the memory of a second copy of the
weights is saved: 2 bytes a weight in place of 4, in host memory if the optimizer is paged.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from minitune.kernels.adamw import BLOCK, Moment, Rate, adamw_

BETAS, EPS = (0.9, 0.999), 1e-8
SMALLEST_PAGED = 100_000  # numbers of a parameter, as in bitsandbytes: below, pages are not worth it
SMALL = 4096  # parameters of fewer numbers keep 32-bit moments


class MasterAdamW(torch.optim.Optimizer):
    """AdamW for bf16 parameters; 32-bit moments or 8-bit ones; all but the weights in paged memory if `paged`."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, eight_bits: bool = False, paged: bool = False) -> None:
        super().__init__(groups, {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0})
        self.eight_bits, self.paged = eight_bits, paged

    def init_state(self, group: dict[str, Any], parameter: Tensor, *_: int) -> None:
        """The state of a parameter before its first step."""
        assert parameter.dtype == torch.bfloat16, parameter.dtype
        state, numbers = self.state[parameter], parameter.numel()
        state["step"] = torch.zeros((), device=parameter.device)
        state["lower"] = self.room(parameter, torch.int16)
        eight = self.eight_bits and numbers >= SMALL
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = self.room(parameter, torch.uint8 if eight else torch.float32)
            if eight:  # a scale of 0, so whatever the levels are they mean 0
                state[f"{name}_scale"] = torch.zeros(-(-numbers // BLOCK), device=parameter.device)

    def room(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros in the shape of a parameter."""
        if not self.paged or parameter.numel() < SMALLEST_PAGED:
            return torch.zeros_like(parameter, dtype=dtype)
        memory = Paged(parameter.numel() * dtype.itemsize, parameter.device).tensor
        return memory.view(dtype).view(parameter.shape).zero_()

    @torch.no_grad()
    def step(self, scale: Tensor | float = 1.0, finite: Tensor | bool = True) -> None:
        """Gradients are multiplied by `scale` on their way; where `finite` is false, nothing changes at all."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.init_state(group, parameter)
        device = parameters[0].device
        scale, finite = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (scale, finite))
        torch._foreach_add_([self.state[p]["step"] for p in parameters], finite.float())
        steps = self.state[parameters[0]]["step"].double()
        numbers = torch.stack([scale, finite, *(1 - beta**steps for beta in BETAS)]).float()
        for group in self.param_groups:
            rate = Rate(group["lr"], group["weight_decay"], group["betas"], group["eps"], numbers)
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():  # of a small one, some ranks may have no rows
                    state = self.state[parameter]
                    moments = [moment(state, name) for name in ("exp_avg", "exp_avg_sq")]
                    adamw_(parameter, state["lower"], parameter.grad.contiguous(), *moments, rate)


class Paged:
    """Bytes in CUDA's managed memory, which moves to the host when the GPU is short and back when it is used.

    bitsandbytes allocates them and hands them out as a tensor on the CPU; this is the same memory as one on the GPU.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        import bitsandbytes.functional as bnb

        self.memory = bnb.get_paged(size, dtype=torch.uint8, device=device)
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (self.memory.data_ptr(), False),
            "version": 2,
        }
        self.tensor = torch.as_tensor(self, device=device)


def moment(state: dict[str, Tensor], name: str) -> Moment:
    if f"{name}_scale" not in state:
        return Moment(state[name])
    return Moment(state[name], state[f"{name}_scale"], *levels(state[name].device, signed=name == "exp_avg"))


@cache
def levels(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """What eight bits of a moment mean, and the borders between: bitsandbytes' dynamic map, denser towards zero."""
    import bitsandbytes.functional as bnb

    values = bnb.create_dynamic_map(signed=signed).float()
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)
