"""Blocks by hand and every layout of documents and of memory: what attention's graph saves is found again as it was.

A graph saves its output in an order of its own, saves a wider tensor of which the output is a part, saves q, k and v or
copies of them, or nothing of the kind. Each core below does one of these, over the documents of each layout.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import test_block
import torch
import torch.nn.functional as F
from test_block import CPU, LENGTHS, by_hand, distance, llama
from torch import Tensor

from minitune import attention, offload
from minitune.attention import Documents
from minitune.byhand import Keep
from minitune.byhand.attention import AttentionPass
from minitune.offload import HostMemory

LAYOUTS: dict[str, tuple[int, list[int] | None]] = {  # rows of 80, and the lengths of their documents
    "rows are documents": (2, None),
    "one row is one": (1, None),
    "rows, said": (2, [80, 80]),
    "one row, said": (1, [80]),
    "many": (2, LENGTHS),
    "of one token, too": (1, [1, 1, 77, 1]),
}


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """q (B, T, H, h), k (B, T, H, h) -> (B, H, T, T)."""
    T = q.shape[1]
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


class Saved(torch.autograd.Function):
    """Attention that saves its output, as flash-attention does, by way of `laid`; its backward pass reads it."""

    laid: Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, T, H, h) -> what is saved, the output over the same memory

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        saved, out = Saved.laid(torch.einsum("bhqk,bkhc->bqhc", probabilities(q, k), v))
        ctx.saved_shape = saved.shape
        ctx.save_for_backward(q, k, v, saved)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, saved = ctx.saved_tensors
        assert saved.shape == ctx.saved_shape
        out = saved[..., : q.shape[-1]]
        out = out if out.shape == q.shape else out.transpose(1, 2)
        p = probabilities(q, k)
        row = torch.einsum("bqhc,bqhc->bhq", dout, out)[..., None]  # the softmax's own sum, from the output
        ds = p * (torch.einsum("bqhc,bkhc->bhqk", dout, v) - row) * q.shape[-1] ** -0.5
        dv = torch.einsum("bhqk,bqhc->bkhc", p, dout)
        return torch.einsum("bhqk,bkhc->bqhc", ds, k), torch.einsum("bhqk,bqhc->bkhc", ds, q), dv


def heads_first(out: Tensor) -> tuple[Tensor, Tensor]:
    """Memory (B, H, T, h), which a block's (N, H h) is a copy of."""
    saved = out.transpose(1, 2).contiguous()
    return saved, saved.transpose(1, 2)


def seen_heads_first(out: Tensor) -> tuple[Tensor, Tensor]:
    """Memory (B, T, H, h), seen as (B, H, T, h)."""
    out = out.contiguous()
    return out.transpose(1, 2), out


def wider(out: Tensor) -> tuple[Tensor, Tensor]:
    """Padded to a width that a kernel likes; the output begins at the same address."""
    saved = F.pad(out, (0, 4))
    return saved, saved[..., :-4]


def as_it_is(out: Tensor) -> tuple[Tensor, Tensor]:
    return out, out


def saving(laid: Callable) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        Saved.laid = staticmethod(laid)
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        return Saved.apply(q, k, v)

    return attend


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Autograd's own: the probabilities and copies of q, k, v, not the output."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    return torch.einsum("bhqk,bkhc->bqhc", probabilities(q, k), v)


CORES = {
    "PyTorch's": attention.attend,
    "heads first": saving(heads_first),
    "seen heads first": saving(seen_heads_first),
    "wider": saving(wider),
    "as it is": saving(as_it_is),
    "nothing": nothing,
}


def found(layout: str, heads: int, core: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Gradients by autograd, under "plain", and by hand under what is kept, and where."""
    rows, lengths = LAYOUTS[layout]
    monkeypatch.setattr(offload, "SMALLEST", 1000)
    monkeypatch.setattr(offload, "WIDEST", 4)
    monkeypatch.setattr(attention, "attend", CORES[core])
    monkeypatch.setattr(test_block, "SHAPE", replace(test_block.SHAPE, num_key_value_heads=heads))
    tokens = torch.randint(3, 61, (rows, 80), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths or [80] * rows]).view(rows, 80)
    documents = None if lengths is None else Documents.of(lengths)

    def gradients(model) -> dict[str, Tensor]:
        (model(tokens, positions, documents, tokens.roll(-1, 1)) / 100).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    by_keep = {keep.name: gradients(by_hand(llama("lora", layers=2), keep)) for keep in Keep}
    away = gradients(by_hand(llama("lora", layers=2), Keep.ATTENTION, HostMemory(CPU)))
    return {"plain": gradients(llama("lora", layers=2)), **by_keep, "away": away}


@pytest.mark.parametrize(
    ("heads", "core"), [*((2, core) for core in CORES), (4, "PyTorch's"), (1, "PyTorch's"), (1, "wider")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_autograd_s(layout: str, heads: int, core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by = found(layout, heads, core, monkeypatch)
    far = {name: distance(gradients, by["plain"]) for name, gradients in by.items()}
    assert max(far.values()) < 1e-5, far


@pytest.mark.parametrize("core", ["PyTorch's", "seen heads first"])
@pytest.mark.parametrize("layout", ["rows are documents", "one row is one"])
def test_another_order_at_the_same_address_is_noticed(layout: str, core: str, monkeypatch) -> None:
    """The mistake: what lies at the output's address is the output, as it is."""

    def keep_output(self: AttentionPass, out: Tensor) -> None:
        self.output_at = next((i for i, x in enumerate(self.kept) if x.data_ptr() == out.data_ptr()), len(self.kept))
        if self.output_at == len(self.kept):
            self.kept.append(out)
        self.saved_order = [(x.size(), x.stride()) for x in self.kept[self.output_at :]]

    monkeypatch.setattr(AttentionPass, "keep_output", keep_output)
    by = found(layout, 2, core, monkeypatch)
    assert distance(by["ATTENTION"], by["plain"]) > 1e-2
    assert distance(by["INPUT"], by["plain"]) < 1e-5
