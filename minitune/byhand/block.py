"""A decoder block by hand, top to bottom and back: what `model.Block` computes, in the fewest passes over memory.

The names of the backward pass are those of fan.py: dy, xa, t. N = B T tokens, all rows end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.attention import Documents
from minitune.byhand.attention import AttentionPass, Keep
from minitune.byhand.fan import Dense, Fan
from minitune.kernels.dropout import Dropout
from minitune.kernels.norm import norm, norm_backward
from minitune.kernels.rotary import turn, turn_backward
from minitune.kernels.swiglu import swiglu, swiglu_backward
from minitune.model import Block
from minitune.offload import HostMemory, block_of


class HandBlock:
    """A block's forward pass, with the face of `model.Block.forward`."""

    def __init__(self, block: Block, keep: Keep, dense: Dense, host: HostMemory | None) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.block, self.keep, self.host, self.attention = block, keep, host, attention
        self.norms = (block.input_layernorm, block.post_attention_layernorm)
        self.qkv = Fan("qkv", [attention.q_proj, attention.k_proj, attention.v_proj], dense)
        self.o = Fan("o", [attention.o_proj], dense)
        self.gate_up = Fan("gate_up", [mlp.gate_proj, mlp.up_proj], dense)
        self.down = Fan("down", [mlp.down_proj], dense)
        self.fans = (self.qkv, self.o, self.gate_up, self.down)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        """x (B, T, D), cos and sin (B or 1, T, 1, h/2) -> (B, T, D)."""
        trained = [norm.weight for norm in self.norms if norm.weight.requires_grad]
        trained += [parameter for fan in self.fans for parameter in fan.trained()]
        with block_of(self.host):
            return BlockFunction.apply(x, cos, sin, documents, self, torch.is_grad_enabled(), *trained)

    def drops(self) -> list[Dropout | None]:
        """How each fan drops its adapters' input in this pass."""
        share = max((fan.dropout for fan in self.fans), default=0.0) if self.block.training else 0.0
        if share == 0:
            return [None] * len(self.fans)
        drop = Dropout.draw(share, self.norms[0].weight.device, 2 * len(self.fans))
        return [Dropout(seeds, drop.threshold) for seeds in drop.seeds.split(2)]

    def inputs(self, x, xa, tables, drop):
        """x (N, D) -> the first norm's factor, what went down, and q, k, v ready for attention (N, heads, h)."""
        h, _, factor = norm(x, self.norms[0].weight, self.norms[0].eps)
        xa = self.qkv.down(h, drop) if xa is None else xa
        qk, v = self.qkv.product_but_last(h, xa)
        q, k = turn(qk, xa, self.qkv.B, *tables, self.qkv.widths[0] // self.attention.head_dim)
        return factor, xa, (q, k, v.view(len(v), -1, self.attention.head_dim))

    def middle(self, x, o, xa, drop):
        """Attention's output (N, H h), projected and added to x: the sum x2, its norm h, the factor, what went down."""
        xa = self.o.down(o, drop) if xa is None else xa
        h, x2, factor = norm(self.o.adapted(o, xa), self.norms[1].weight, self.norms[1].eps, x)
        return x2, h, factor, xa


class BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, documents, hand, learning, *trained):
        B, T, D = x.shape
        x = x.reshape(B * T, D)
        tables = [table.expand(B, T, 1, -1).reshape(B * T, -1) for table in (cos, sin)]  # (N, h/2)
        keep, drops = hand.keep, hand.drops()
        copies = [copy for fan in hand.fans for copy in fan.refresh()]
        if copies:
            torch._foreach_copy_(*map(list, zip(*copies, strict=True)))

        factor1, xa_qkv, qkv = hand.inputs(x, None, tables, drops[0])
        core = AttentionPass(hand.attention.core, documents, (B, T))
        o = core.forward(qkv, keep if learning else None)
        if keep is not Keep.QKV:
            del qkv
        x2, h, factor2, xa_o = hand.middle(x, o, None, drops[1])
        xa_gate_up = hand.gate_up.down(h, drops[2])
        gate_up = hand.gate_up.product(h)
        del h
        h, xa_down = swiglu(
            gate_up, xa_gate_up, hand.gate_up.B, hand.down.A, hand.down.scaling, drops[3]
        )  # (N, F), with what goes down in down's adapter
        out = x2 + hand.down.adapted(h, xa_down)

        if learning:
            ctx.hand, ctx.core, ctx.drops, ctx.shape = hand, core, drops, (B, T, D)
            kept = ()
            if keep is Keep.ALL:
                kept = (factor1, x2, factor2, gate_up)
            elif keep is Keep.QKV:
                kept = (factor1, *qkv)
            thin = (xa_qkv, xa_o, xa_gate_up, xa_down)
            ctx.counts = len(core.kept), len(kept)
            ctx.save_for_backward(x, *tables, *thin, *core.kept, *kept)
            core.kept = []
        return out.view(B, T, D)

    @staticmethod
    def backward(ctx, dout):
        hand, core, drops, (B, T, D) = ctx.hand, ctx.core, ctx.drops, ctx.shape
        x, cos, sin, xa_qkv, xa_o, xa_gate_up, xa_down, *rest = ctx.saved_tensors
        tables, weights1, weights2 = (cos, sin), hand.norms[0].weight, hand.norms[1].weight
        dout = dout.reshape(B * T, D)
        core.kept, kept = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
        del rest

        # What was not kept, computed again; never the product with down, which nothing here needs.
        if hand.keep is Keep.ALL:
            factor1, x2, factor2, gate_up = kept
            o = core.output()
        else:
            if hand.keep is Keep.QKV:
                factor1, *qkv = kept
            else:
                factor1, _, qkv = hand.inputs(x, xa_qkv, tables, None)
            o = core.again(qkv)
            del qkv
            x2, h, factor2, _ = hand.middle(x, o, xa_o, None)
            gate_up = hand.gate_up.product(h)
            del h
        del kept

        # The MLP: out = x2 + down(silu(gate) * up)
        t = hand.down.down_back(dout)
        dh = hand.down.product_back(dout)
        dgate_up, h, t_gate_up, dB, dA = swiglu_backward(
            dh, t, gate_up, xa_gate_up, hand.gate_up.B, hand.down.A, hand.gate_up.scaling, drops[3],
            again=hand.down.trains_bare(),
        )  # fmt: skip
        del dh, gate_up
        down_grads = hand.down.gradients(h, xa_down, dout, t, drops[3], dA=dA)
        del h
        dh = hand.gate_up.back(dgate_up, t_gate_up, drops[2])
        dx2, h, dweights2 = norm_backward(dh, x2, weights2, factor2, dout, weights2.requires_grad)
        del dh, x2
        gate_up_grads = hand.gate_up.gradients(h, xa_gate_up, dgate_up, t_gate_up, drops[2], dB=dB)
        del dgate_up, h

        # Attention: x2 = x + o_proj(attention(q, k, v))
        t = hand.o.down_back(dx2)
        do = hand.o.back(dx2, t, drops[1])
        o_grads = hand.o.gradients(o, xa_o, dx2, t, drops[1])
        del o
        dq, dk, dv = core.backward(do)
        del do
        dqkv, t_qkv = turn_backward(dq, dk, dv, hand.qkv.B, *tables, hand.qkv.scaling)
        del dq, dk, dv
        dx = dweights1 = None
        if ctx.needs_input_grad[0] or weights1.requires_grad:
            dh = hand.qkv.back(dqkv, t_qkv, drops[0])
            dx, h, dweights1 = norm_backward(dh, x, weights1, factor1, dx2, weights1.requires_grad)
            del dh
        else:  # nothing before this block learns
            h, _, _ = norm(x, weights1, hand.norms[0].eps)
        qkv_grads = hand.qkv.gradients(h, xa_qkv, dqkv, t_qkv, drops[0])

        norm_grads = [grad for grad in (dweights1, dweights2) if grad is not None]
        grads = (*norm_grads, *qkv_grads, *o_grads, *gate_up_grads, *down_grads)
        return (None if dx is None else dx.view(B, T, D)), *[None] * 5, *grads


class NormFunction(torch.autograd.Function):
    """RMSNorm of (B, T, D), as `model.RMSNorm`."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, flat, factor = norm(x.reshape(-1, x.shape[-1]), weight, eps)
        ctx.save_for_backward(flat, weight, factor)
        return y.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, factor = ctx.saved_tensors
        dx, _, dweight = norm_backward(dy.flatten(0, -2).clone(), x, weight, factor, None, ctx.needs_input_grad[1])
        return dx.view_as(dy), dweight, None
