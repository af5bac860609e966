"""Blocks by hand: the passes of `model.Block`, forward and backward, written out for speed.

`model.Block` says what is computed, and autograd would find the same gradients; what is here is its twin. It knows
three things that autograd does not: that frozen weights need no gradient, that an adapter's part can ride along in a
kernel that passes over the tensor anyway, and what to compute again instead of keeping. It takes blocks whose linears
are plain, frozen or trained, or NF4, each bare or with LoRA (`refusal` says what else there is); anything else runs as
`model.Block`, by way of autograd. On a CPU the same code runs on the kernels' plain twins.

    block.py       a block, top to bottom and back; the last norm
    fan.py         linears that read the same input: products, adapters, gradients; dense weights of NF4
    attention.py   any attention core between the halves; what a block keeps
"""

from collections.abc import Sequence

import torch
from torch import nn

from minitune.adapters.lora import LoRALinear
from minitune.byhand.attention import Keep
from minitune.byhand.block import HandBlock, NormFunction
from minitune.byhand.fan import Dense, lay_side_by_side
from minitune.kernels import launch
from minitune.kernels.dropout import Dropout
from minitune.kernels.low_rank import down, gradient
from minitune.kernels.swiglu import swiglu_backward
from minitune.model import Block, Llama, RMSNorm
from minitune.nf4 import NF4Linear
from minitune.offload import HostMemory

__all__ = ["Keep", "by_hand", "fault", "lay_side_by_side", "refusal"]

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LARGEST_RANK = 64  # what the kernels hold in registers


def by_hand(model: Llama, keep: Sequence[Keep], host: HostMemory | None = None, own_dense: bool = False) -> None:
    """Let the blocks of a model, and its last norm, run by hand.

    keep: what each block keeps. host: where those that do not keep all put it, if not on the device.
    own_dense: give each NF4 linear room for its dense weight, made once, in place of making it in each pass.
    """
    dense = Dense(shared=not own_dense)
    for block, kept in zip(model.layers, keep, strict=True):
        block.forward = HandBlock(block, kept, dense, None if kept is Keep.ALL else host).forward
    last = model.model.norm
    if type(last) is not RMSNorm:  # it trains as a copy
        return
    last.forward = lambda x: NormFunction.apply(x, last.weight, last.eps)


def refusal(block: Block) -> str | None:
    """Why a block cannot run by hand, or None."""
    kinds, ranks = set(), set()
    if not all(type(norm) is RMSNorm for norm in (block.input_layernorm, block.post_attention_layernorm)):
        return "its norms train beside adapters"
    for name in (*ATTENTION, *MLP):
        linear = getattr(block.self_attn if name in ATTENTION else block.mlp, name)
        if hasattr(linear, "merged_weight"):  # an adapter
            if type(linear).forward is not LoRALinear.forward:
                return f"{type(linear).__name__} has a forward pass of its own"
            if not linear.lora_A.requires_grad:
                return f"{type(linear).__name__} trains B alone"
            ranks.add((linear.lora_A.shape[0], linear.scaling, linear.dropout))
            linear = linear.base
        if type(linear) not in (nn.Linear, NF4Linear):
            return f"{name} is a {type(linear).__name__}"
        if linear.bias is not None:
            return f"{name} has a bias"
        kinds.add(type(linear))
    if len(kinds) > 1:
        return "only some of its linears are NF4"
    if len(ranks) > 1:
        return "its adapters differ in rank, scaling or dropout"
    if ranks and max(ranks)[0] > LARGEST_RANK:
        return f"its adapters have a rank above {LARGEST_RANK}"
    return None


def fault(model: Llama, device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels of a model's blocks, or None."""
    adapters = [adapter for adapter in model.layers.modules() if isinstance(adapter, LoRALinear)]
    r = max((adapter.lora_A.shape[0] for adapter in adapters), default=0)
    share = max((adapter.dropout for adapter in adapters), default=0.0)
    return launch.fault(device, lambda: largest_kernels(r, share, device))


def largest_kernels(r: int, share: float, device: torch.device) -> None:
    """Launch what needs most shared memory with adapters of rank r (0: none) that drop a share, and wait: SwiGLU's
    backward pass, and dropout's thin products for three adapters, of as many rows as are taken at once."""
    like = {"dtype": torch.bfloat16, "device": device}
    dh, gate_up = torch.zeros(64, 64, **like), torch.zeros(64, 128, **like)
    thin = [torch.zeros(*shape, **like) if r else None for shape in ((64, r), (64, 2 * r), (128, r), (r, 64))]
    t, xa, B, A = thin
    swiglu_backward(dh, t, gate_up, xa, B, A).dgate_up.sum().item()
    if r and share:
        x, A, drop = torch.zeros(8256, 128, **like), torch.zeros(3 * r, 128, **like), Dropout.draw(share, device)
        gradient(down(x, A, 1.0, 3, drop), x, 3, drop).sum().item()
