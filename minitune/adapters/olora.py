"""OLoRA, https://arxiv.org/abs/2406.01775: PiSSA with another start, the first r columns of Q and rows of R in W = Q R.

B0 = Q_r (out, r), orthonormal;   A0 = R_r (r, in);   s B0 A0 is taken off W (see pissa.py), s = alpha / r
"""

from typing import ClassVar

import torch
from torch import Tensor

from minitune.adapters.base_weight import whole_weight
from minitune.adapters.pissa import PiSSALinear
from minitune.errors import UserError


class OLoRALinear(PiSSALinear):
    PEFT_CONFIG: ClassVar = {"init_lora_weights": "olora"}

    def start(self) -> tuple[Tensor, Tensor]:
        W, r = whole_weight(self.base).float(), self.lora_A.shape[0]
        if r > min(W.shape):
            raise UserError(f"lora.r: a weight of {tuple(W.shape)} has no {r} orthonormal columns; lower it")
        Q, _ = torch.linalg.qr(W[:, :r])  # the first r columns of W decide the first r of Q
        return Q.T @ W, Q
