"""A decoder block by hand: what `model.Block` computes, forward and backward, in the fewest passes over memory.

`model.Block` says what is computed, and autograd would find the same gradients; this file is its twin for speed. It
knows three things that autograd does not: that frozen weights need no gradient, that an adapter's part can ride along
in a kernel that passes over the tensor anyway, and what to compute again instead of keeping. It takes blocks whose
linears are plain, frozen or trained, or NF4, each bare or with LoRA (`refusal` says what else there is); anything else
runs as `model.Block`, by way of autograd. On a CPU the same code runs on the kernels' plain twins.

The names of the backward pass: `dy` is the gradient of the loss for y; `xa` what went down in an adapter, x A^T; `t`
what comes down in the backward pass, dy B; both carry the adapter's scaling. N = B T tokens, all rows end to end.

    LoRA's gradients:  y = x W^T + s (x A^T) B^T      dx = dy W + t A    dA = t^T x    dB = dy^T xa
    with               xa = s x A^T, t = s dy B
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from minitune.adapters.lora import LoRALinear
from minitune.attention import Documents
from minitune.kernels.dropout import Dropout
from minitune.kernels.low_rank import down, gradient, product_fp32, up
from minitune.kernels.norm import norm, norm_backward
from minitune.kernels.rotary import turn, turn_backward
from minitune.kernels.swiglu import swiglu, swiglu_backward
from minitune.model import Block, Llama
from minitune.nf4 import NF4Linear
from minitune.offload import HostMemory, block_of

LARGEST_RANK = 64  # what the kernels hold in registers


class Keep(Enum):
    """What a block keeps between forward and backward, besides its input and what went down in its adapters."""

    ALL = "q k v, attention's output, the sum after it, gate and up"  # nothing is computed again
    ATTENTION = "attention's output"  # the products are computed again, all but down's; not attention
    INPUT = "nothing"  # attention is computed again as well


def by_hand(model: Llama, keep: list[Keep], host: HostMemory | None = None, own_dense: bool = False) -> None:
    """Let the blocks of a model, and its last norm, run by hand.

    keep: what each block keeps. host: where those that do not keep all put it, if not on the device.
    own_dense: give each NF4 linear room for its dense weight, made once, in place of making it in each pass.
    """
    dense = Dense(shared=not own_dense)
    for block, kept in zip(model.layers, keep, strict=True):
        block.forward = HandBlock(block, kept, dense, None if kept is Keep.ALL else host).forward
    last = model.model.norm
    last.forward = lambda x: NormFunction.apply(x, last.weight, last.eps)


def refusal(block: Block) -> str | None:
    """Why a block cannot run by hand, or None."""
    bases, ranks = [], set()
    for name in (*ATTENTION, *MLP):
        linear = getattr(block.self_attn if name in ATTENTION else block.mlp, name)
        if isinstance(linear, LoRALinear):
            if type(linear).forward is not LoRALinear.forward:
                return f"{type(linear).__name__} has a forward pass of its own"
            ranks.add((linear.lora_A.shape[0], linear.scaling, linear.dropout))
            linear = linear.base
        if type(linear) not in (nn.Linear, NF4Linear):
            return f"{name} is a {type(linear).__name__}"
        if linear.bias is not None:
            return f"{name} has a bias"
        bases.append(linear)
    if len(ranks) > 1:
        return "its adapters differ in rank, scaling or dropout"
    if ranks and max(ranks)[0] > LARGEST_RANK:
        return f"its adapters have a rank above {LARGEST_RANK}"
    return None


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


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
            kept = (factor1, x2, factor2, gate_up) if keep is Keep.ALL else ()
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
        if kept:
            factor1, x2, factor2, gate_up = kept
            o = core.output()
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
        dgate_up, h, t_gate_up = swiglu_backward(
            dh, t, gate_up, xa_gate_up, hand.gate_up.B, hand.down.A, hand.gate_up.scaling, drops[3]
        )
        del dh, gate_up
        down_grads = hand.down.gradients(h, xa_down, dout, t, drops[3])
        del h
        dh = hand.gate_up.back(dgate_up, t_gate_up, drops[2])
        dx2, h, dweights2 = norm_backward(dh, x2, weights2, factor2, dout, weights2.requires_grad)
        del dh, x2
        gate_up_grads = hand.gate_up.gradients(h, xa_gate_up, dgate_up, t_gate_up, drops[2])
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


class Fan:
    """Linears that read the same input, as one product: q, k and v; o; gate and up; down."""

    def __init__(self, name: str, linears: list[nn.Module], dense: Dense) -> None:
        self.name, self.dense = name, dense
        self.adapters = [linear if isinstance(linear, LoRALinear) else None for linear in linears]
        self.bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
        self.widths = [linear.out_features for linear in linears]
        some = next((adapter for adapter in self.adapters if adapter is not None), None)
        self.rank, self.scaling, self.dropout = (
            (some.lora_A.shape[0], some.scaling, some.dropout) if some else (0, 1.0, 0.0)
        )
        self.A: Tensor | None = None
        self.B: Tensor | None = None

    def trained(self) -> Iterator[nn.Parameter]:
        """Its parameters that train, in the order of `gradients`."""
        for base, adapter in zip(self.bases, self.adapters, strict=True):
            own = [adapter.lora_A, adapter.lora_B] if adapter else [base.weight] if type(base) is nn.Linear else []
            yield from (parameter for parameter in own if parameter.requires_grad)

    def refresh(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Where its adapters' parameters are copied to, in the dtype that multiplies, and the parameters.

        A (n r, in): the ways down, one above the other; B (out, r): the ways up. Where a linear has no adapter among
        others that have, zeros take its place.
        """
        if not self.rank:
            return
        if self.A is None or self.A.device != self.device():
            like = {"dtype": dtype_of(self.bases[0]), "device": self.device()}
            self.A = torch.zeros(len(self.adapters) * self.rank, self.bases[0].in_features, **like)
            self.B = torch.zeros(sum(self.widths), self.rank, **like)
        places = zip(self.adapters, self.A.chunk(len(self.adapters)), self.B.split(self.widths), strict=True)
        for adapter, A, B in places:
            if adapter:
                yield A, adapter.lora_A
                yield B, adapter.lora_B

    def device(self) -> torch.device:
        return next(adapter for adapter in self.adapters if adapter).lora_A.device

    # ---- forward ---------------------------------------------------------------------------------------------------

    def product(self, x: Tensor) -> Tensor:
        """x W^T, side by side: (N, in) -> (N, out)."""
        out = x.new_empty(x.shape[0], sum(self.widths))
        for weight, columns in self.weights(out):
            torch.mm(x, weight.T, out=columns)
        return out

    def down(self, x: Tensor, drop: Dropout | None) -> Tensor | None:
        """What goes down in its adapters, scaled: (N, in) -> (N, n r)."""
        return down(x, self.A, self.scaling, len(self.adapters), drop) if self.rank else None

    def adapted(self, x: Tensor, xa: Tensor | None) -> Tensor:
        """The whole output of a fan of one, (N, in) -> (N, out).

        The adapter's part comes first and the large product adds itself to it, in fp32. The other way round, what an
        adapter adds to numbers that are bf16 already is lost while it is below half a step of theirs: in the first
        steps of training, most of it.
        """
        return self.product(x) if xa is None else added_to(xa @ self.B.T, x, next(self.weights_alone()))

    def product_but_last(self, x: Tensor, xa: Tensor | None) -> tuple[Tensor, Tensor]:
        """The products of all its linears but the last, side by side, and the whole output of the last."""
        *others, last = self.weights_alone()
        first = x.new_empty(x.shape[0], sum(self.widths[:-1]))
        whole = side_by_side(others)
        pairs = [(whole, first)] if whole is not None else zip(others, first.split(self.widths[:-1], 1), strict=True)
        for weight, columns in pairs:
            torch.mm(x, weight.T, out=columns)
        if xa is None:
            return first, x @ last.T
        return first, added_to(xa[:, -self.rank :] @ self.B[-self.widths[-1] :].T, x, last)

    # ---- backward --------------------------------------------------------------------------------------------------

    def down_back(self, dy: Tensor) -> Tensor | None:
        """t of a fan of one, scaled: (N, out) -> (N, r)."""
        return down(dy, self.B.T, self.scaling) if self.rank else None

    def product_back(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """dy W, added to `out` where that is given: (N, out) -> (N, in)."""
        for weight, columns in self.weights(dy):
            out = torch.mm(columns, weight) if out is None else out.addmm_(columns, weight)
        return out

    def back(self, dy: Tensor, t: Tensor | None, drop: Dropout | None) -> Tensor:
        """The gradient of its input (N, in), the adapters' part first."""
        return self.product_back(dy, None if t is None else up(t, self.A, len(self.adapters), drop))

    def gradients(
        self, x: Tensor, xa: Tensor | None, dy: Tensor, t: Tensor | None, drop: Dropout | None
    ) -> list[Tensor]:
        """Of each parameter of `trained`, from its input x, its output's gradient dy, and what went and came down."""
        grads, n = [], len(self.adapters)
        if any(adapter and adapter.lora_A.requires_grad for adapter in self.adapters):
            dA = gradient(t, x, n, drop).chunk(n)
        for i, (base, adapter) in enumerate(zip(self.bases, self.adapters, strict=True)):
            columns = dy.split(self.widths, dim=1)[i]
            if adapter and adapter.lora_A.requires_grad:
                grads.append(dA[i])
            if adapter and adapter.lora_B.requires_grad:
                grads.append(product_fp32(columns.T, xa.chunk(n, dim=1)[i]))
            if not adapter and type(base) is nn.Linear and base.weight.requires_grad:
                wide = base.weight.grad_dtype != x.dtype
                grads.append(product_fp32(columns.T, x) if wide else columns.T @ x)
        return grads

    # ---- weights ---------------------------------------------------------------------------------------------------

    def weights(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Dense weights, and the columns of y (N, out) that are theirs: one for all where they lie side by side."""
        weights = list(self.weights_alone())
        if (whole := side_by_side(weights)) is not None:
            yield whole, y
        else:
            yield from zip(weights, y.split(self.widths, dim=1), strict=True)

    def weights_alone(self) -> Iterator[Tensor]:
        """The dense weight (out, in) of each linear."""
        if isinstance(self.bases[0], NF4Linear):
            yield from self.dense.of(self).split(self.widths)
        else:
            yield from (base.weight for base in self.bases)


class Dense:
    """Room for dense weights of NF4 linears. Blocks share it, so it holds those of one block at a time; within a
    backward pass, what recomputing made dense is still there for the gradients. Or each has its own, made once."""

    def __init__(self, shared: bool = True) -> None:
        self.shared = shared
        self.rooms: dict[Any, Tensor] = {}
        self.holders: dict[Any, Any] = {}

    def of(self, fan: Fan) -> Tensor:
        """The weights of a fan, one above the other: (out, in)."""
        place = fan.name if self.shared else fan
        holder = (fan, *(base.packed._version for base in fan.bases))
        if place not in self.rooms:
            first = fan.bases[0]
            shape = (sum(fan.widths), first.in_features)
            self.rooms[place] = torch.empty(shape, dtype=first.dtype, device=first.packed.device)
        if self.holders.get(place) != holder:
            for base, rows in zip(fan.bases, self.rooms[place].split(fan.widths), strict=True):
                base.dense_weight(out=rows)
            self.holders[place] = holder
        return self.rooms[place]


@torch.no_grad()
def lay_side_by_side(block: Block) -> None:
    """Give the linears that read the same input one piece of memory, so that one product serves them."""
    attention, mlp = block.self_attn, block.mlp
    for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        weights = [getattr(linear, "base", linear).weight for linear in linears]
        room, start = torch.cat(weights), 0
        for weight in weights:
            weight.data = room[start : start + len(weight)]
            start += len(weight)


def side_by_side(weights: list[Tensor]) -> Tensor | None:
    """Weights that follow each other in memory as one (out, in), or None."""
    end = weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride())


def added_to(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T, in the place of y; summed in fp32, rounded once."""
    return y.addmm_(x, weight.T)


def dtype_of(base: nn.Module) -> torch.dtype:
    return base.dtype if isinstance(base, NF4Linear) else base.weight.dtype


class AttentionPass:
    """Attention between the block's own halves: any core, by way of its own graph.

    What the graph keeps is told apart: q, k and v, which can be computed again, and the rest, which is kept in their
    stead (attention's output and the log-sum-exp of the scores).
    """

    def __init__(self, core: nn.Module, documents: Documents | None, shape: tuple[int, int]) -> None:
        self.core, self.documents, self.shape = core, documents, shape
        self.kept: list[Tensor] = []  # the rest, while it is here

    def forward(self, qkv: tuple[Tensor, ...], keep: Keep | None) -> Tensor:
        """q, k, v (N, heads, h) -> (N, H h). keep None or INPUT: leaves nothing for a backward pass."""
        if keep is Keep.ALL:
            return self.run(qkv)
        if keep is Keep.ATTENTION:
            with torch.autograd.graph.saved_tensors_hooks(self.put, self.get):
                out = self.run(qkv)
            self.output_at = next((i for i, x in enumerate(self.kept) if x.data_ptr() == out.data_ptr()), None)
            if self.output_at is None:
                self.output_at = len(self.kept)
                self.kept.append(out)
            self.out = torch.autograd.graph.get_gradient_edge(self.out)  # the node alone, without the tensor
            for x in self.given:
                x.untyped_storage().resize_(0)  # the graph's inputs stay its inputs, without their memory
            return out
        with torch.no_grad():
            return self.core(*self.rows(qkv), self.documents).reshape(len(qkv[0]), -1)

    def again(self, qkv: tuple[Tensor, ...]) -> Tensor:
        """Attention's output in the backward pass, for q, k, v computed again."""
        if not self.kept:
            return self.run(qkv)
        self.fresh = qkv
        return self.output()

    def output(self) -> Tensor:
        whole = self.kept[self.output_at] if self.kept else self.out.detach()
        return whole.reshape(self.shape[0] * self.shape[1], -1)

    def backward(self, do: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v (N, heads, h)."""
        B, T = self.shape
        do = do.view(B, T, self.given[0].shape[2], -1)
        grads = torch.autograd.grad([self.out], self.given, [do])
        self.out = self.given = self.fresh = None
        self.kept = []
        return tuple(grad.reshape(B * T, *grad.shape[2:]).contiguous() for grad in grads)

    def run(self, qkv: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad():
            self.given = [x.detach().requires_grad_() for x in self.rows(qkv)]
            self.out = self.core(*self.given, self.documents)
        return self.out.detach().reshape(len(qkv[0]), -1)

    def rows(self, qkv: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.view(*self.shape, *x.shape[1:]) for x in qkv]

    def put(self, x: Tensor) -> Any:
        for i, given in enumerate(self.given):
            if x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
                return "given", i, x.size(), x.stride(), x.storage_offset()
        self.kept.append(x)
        return "kept", len(self.kept) - 1

    def get(self, what: Any) -> Tensor:
        if what[0] == "kept":
            return self.kept[what[1]]
        _, i, size, stride, offset = what
        return self.fresh[i].as_strided(size, stride, offset)
