"""A model spread over the memory of several ranks, by FSDP2, https://arxiv.org/abs/2304.11277.

Of each matrix a rank keeps some rows, and before a decoder block computes, the ranks gather the rows of that block,
the next block's already on their way; afterwards they are dropped again. What trains as an adapter is small and stays
whole on every rank, as under `replicate`; where all weights train, a rank updates its own rows.

NF4 weights are bytes, gathered as they are. Nothing is cast on the way, and gradients are summed, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minitune import launch, parallel, watch
from minitune.errors import RunFailed, UserError
from minitune.nf4 import NF4Linear
from minitune.parallel import rank, sum_over_ranks, world


def shard(model: nn.Module, how: str, device: torch.device) -> None:
    """Spread a model that is still on the meta device: over all ranks ("full"), or over those of each machine, with
    every machine holding all of it ("hybrid"). A decoder block is one unit; norm, head and embedding are another."""
    if any(isinstance(module, NF4Linear) for module in model.modules()) and too_old():
        raise UserError(
            f"parallel.sharding: four-bit weights are sharded with PyTorch 2.12 or newer, and this is "
            f"{torch.__version__}; install that, or set it to replicate, or method to lora"
        )
    mesh = mesh_of(how, device)
    trains = any(p.requires_grad and p.is_leaf for p in model.parameters())
    whole = {p for module in model.modules() for p in stays_whole(module)} if trains else set()
    policy = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    common = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole}
    blocks = list(model.layers)
    for block in blocks:
        fully_shard(block, **common)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    units = [*blocks] if tied else [fully_shard(model.model.embed_tokens, **common), *blocks]
    fully_shard(model, reshard_after_forward=False, **common)
    for unit in (model, *units):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies first
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: watch.beat())
