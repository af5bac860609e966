"""LoRA-FA, https://arxiv.org/abs/2308.03303: LoRA whose A is frozen as it was drawn, so that B alone is learned.

Half of the parameters train, and backward needs what went down to r numbers a token, not the input. The gradient of B
is corrected, so that what it does to the weight, s dB A, comes as near to the whole weight's gradient as it can:

    g <- g (A A^T)^-1 / s^2         s = alpha / r

The correction comes after the norm is taken, as in PEFT's LoRA-FA optimizer: max_grad_norm is about the gradient.
"""

import torch
from torch import nn

from minitune.adapters.lora import LoRALinear
from minitune.config import LoRAConfig
from minitune.errors import UserError

DELTA = 1e-8  # added to the diagonal of A A^T


class LoRAFALinear(LoRALinear):
    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        if cfg.r > base.in_features:
            raise UserError(
                f"lora.r: {cfg.r} rows of {base.in_features} numbers have no inverse to correct by; lower it"
            )
        A = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", A, persistent=False)

    @torch.no_grad()
    def correct_gradients(self) -> None:
        if self.lora_B.grad is None:
            return
        squares = self.lora_A @ self.lora_A.T  # (r, r)
        squares.diagonal().add_(DELTA)
        root, _ = torch.linalg.cholesky_ex(squares)  # which waits for no device
        self.lora_B.grad.copy_(torch.cholesky_solve(self.lora_B.grad.T, root).T / self.scaling**2)
