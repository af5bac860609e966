"""AdamW on bf16 weights whose fp32 masters are split in two: the weight itself is the upper half of each number, and
the lower sixteen bits lie with the moments.

At a learning rate of 2e-5 a bf16 weight would round most of its updates away (8 bits of mantissa: a step below 0.4 %
of the weight is lost). Here every update is made in fp32 and nothing is lost, and the memory of a second copy of the
weights is saved: 2 bytes a weight in place of 4, in host memory if the optimizer is paged.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS, EPS = (0.9, 0.999), 1e-8
CHUNK = 2**24  # weights made fp32 at a time
BLOCK = 256  # of weights that share the scale of their 8-bit moments


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 masters of bf16 weights and what int16 adds to them."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)


def split(masters: Tensor, upper: Tensor, lower: Tensor) -> None:
    """The opposite of `join`, exactly: upper is the nearest bf16 (away from zero if two are as near)."""
    bits = masters.view(torch.int32)
    rounded = bits + 0x8000 >> 16
    upper.view(torch.int16).copy_(rounded)
    lower.copy_(bits - (rounded << 16))


class MasterAdamW(torch.optim.Optimizer):
    """AdamW, https://arxiv.org/abs/1711.05101, for bf16 parameters; 32-bit moments, or bitsandbytes' 8-bit ones
    (https://arxiv.org/abs/2110.02861); all but the weights in paged memory if `paged`.

    `scale` multiplies every gradient in `step`: clipping, without a pass of its own.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, eight_bits: bool = False, paged: bool = False) -> None:
        super().__init__(groups, {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0})
        self.eight_bits, self.paged = eight_bits, paged
        self.scale: float | Tensor = 1.0

    def init_state(self, group: dict[str, Any], parameter: Tensor, *_: int) -> None:
        """State of a parameter before its first step; vectors and other small ones keep 32-bit moments."""
        assert parameter.dtype == torch.bfloat16, parameter.dtype
        state = self.state[parameter]
        state["step"] = 0
        state["lower"] = self.room(parameter, torch.int16)
        eight = self.eight_bits and parameter.numel() >= 4096
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = self.room(parameter, torch.uint8 if eight else torch.float32)
            if eight:
                scales = -(-parameter.numel() // BLOCK)
                state[f"{name}_scale"] = torch.zeros(scales, dtype=torch.float32, device=parameter.device)

    def room(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros in the shape of a parameter."""
        if not self.paged or parameter.numel() < 1e5:
            return torch.zeros_like(parameter, dtype=dtype)
        return (
            Paged(parameter.numel() * dtype.itemsize, parameter.device).tensor.view(dtype).view(parameter.shape).zero_()
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.init_state(group, parameter)
                    self.update(parameter, group, self.state[parameter])
        if self.paged:
            torch.cuda.synchronize()  # the host may touch paged memory only when the GPU has done with it

    def update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        state["step"] += 1
        whole = {"weight": parameter, "grad": parameter.grad, **{k: v for k, v in state.items() if k != "step"}}
        for part in pieces(whole):
            masters = join(part["weight"], part["lower"])
            gradient = part["grad"].float() * self.scale
            if "exp_avg_scale" in part:
                self.eight_bit_update(masters, gradient, part, group, state["step"])
            else:
                step = torch.tensor(float(state["step"] - 1), device=masters.device if masters.is_cuda else "cpu")
                adamw(
                    [masters], [gradient], [part["exp_avg"]], [part["exp_avg_sq"]], [], [step],
                    fused=masters.is_cuda, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                    lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip
            split(masters, part["weight"], part["lower"])

    def eight_bit_update(
        self, masters: Tensor, gradient: Tensor, part: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        signed, unsigned = levels(masters.device)
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", gradient, masters, part["exp_avg"], part["exp_avg_sq"], *group["betas"], 0.0, 0.0, group["eps"],
            step, group["lr"], signed, unsigned, part["exp_avg_scale"], part["exp_avg_sq_scale"],
            group["weight_decay"], 1.0, False,
        )  # fmt: skip


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


def pieces(whole: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same stretch of all of a parameter's tensors, CHUNK weights at a time."""
    flat = {name: tensor.view(-1) for name, tensor in whole.items()}
    for start in range(0, flat["weight"].numel(), CHUNK):
        yield {
            name: x[start // BLOCK : -(-(start + CHUNK) // BLOCK)]
            if name.endswith("_scale")
            else x[start : start + CHUNK]
            for name, x in flat.items()
        }


@cache
def levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """What eight bits of a moment mean: signed for the mean, unsigned for the mean square."""
    import bitsandbytes.functional as bnb

    return tuple(bnb.create_dynamic_map(signed=signed).to(device) for signed in (True, False))
