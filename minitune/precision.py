"""Names of the dtypes that a recipe may choose.

What trains is fp32 under all of them: adapters are fp32 parameters, cast where they are used (`adapters/lora.py`);
weights that train in bf16 have fp32 masters, split in two (`masters.py`).
"""

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 numbers as `dtype`, rounded once. PyTorch goes by way of fp32 and rounds twice: of a number just above the
    middle between two in bf16, fp32 leaves the middle, and that goes down."""
    if exact.dtype != torch.float64 or dtype == torch.float32:
        return exact.to(dtype)
    near = exact.float()
    further = near.double().abs() > exact.abs()
    inexact = near.double() != exact
    bits = (near.view(torch.int32) - further.int()) | inexact.int()  # rounded to odd: the last bit says "and more"
    return bits.view(torch.float32).to(dtype)
