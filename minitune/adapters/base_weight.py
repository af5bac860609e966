"""The weight under an adapter, for variants that start from it or are measured by it."""

import torch
from torch import Tensor, nn

from minitune import nf4, sharding
from minitune.errors import UserError
from minitune.nf4 import NF4Linear


@torch.no_grad()
def whole_weight(base: nn.Module) -> Tensor:
    """The dense weight (out, in) of a frozen linear, plain or four-bit; gathered where ranks hold some rows each, so
    that all of them must ask for it."""
    if not isinstance(base, NF4Linear):
        return sharding.whole(base.weight)
    packed, absmax, *nested = base.storage()
    return nf4.dequantize(sharding.whole(packed), sharding.whole(absmax), *nested, base.dtype)


def weight_here(base: nn.Module) -> Tensor:
    """The same inside a forward pass, where whatever it needs has been gathered."""
    return base.dense_weight() if isinstance(base, NF4Linear) else base.weight


@torch.no_grad()
def leading(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values of a weight (out, in), descending, with their vectors: U (out, k), S (k), V (in, k)
    in fp32; the sign of each pair is chance.

    From the eigenvectors of the smaller of W W^T and W^T W, in fp64: many times as fast as a whole decomposition, and
    no less exact for singular values that are large, which these are.
    """
    if k > min(weight.shape):
        raise UserError(f"lora.r: a weight of {tuple(weight.shape)} has no {k} singular values; lower it")
    W = weight.double()
    wide = W.shape[0] <= W.shape[1]
    squares, vectors = torch.linalg.eigh(W @ W.T if wide else W.T @ W)  # ascending
    S, one = squares[-k:].flip(0).clamp(min=0).sqrt(), vectors[:, -k:].flip(1)
    other = (W.T @ one if wide else W @ one) / S.clamp(min=torch.finfo(torch.float64).tiny)
    U, V = (one, other) if wide else (other, one)
    return U.float(), S.float(), V.float()
