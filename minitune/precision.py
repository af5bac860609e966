"""What trains is fp32; what multiplies has the model's dtype.

At a learning rate of 2e-5 a bf16 weight rounds most of its updates away (8 bits of mantissa: a step below 0.4 %
of the weight is lost). So `full` fine-tuning keeps its parameters, gradients and moments in fp32 and casts each
weight where it is used. Adapters do the same for themselves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import surgery

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class MasterLinear(nn.Module):
    """A linear map with an fp32 weight (out, in), computed in the dtype of its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class MasterEmbedding(nn.Module):
    """An fp32 table (V, D) whose rows come out in `dtype`: the dtype of everything after it."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = embedding.weight, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(self.dtype)


def keep_masters(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every matrix be cast to `dtype` where it is used (norms do so by themselves). Names stay as they are."""
    surgery.replace(model, lambda name, leaf: type(leaf) is nn.Linear, MasterLinear)
    surgery.replace(model, lambda name, leaf: type(leaf) is nn.Embedding, lambda e: MasterEmbedding(e, dtype))
