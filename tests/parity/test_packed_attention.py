"""Packed rows against the same documents alone: logits, gradients, and no sight of one another, bit for bit."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from minitune import attention, parallel, pretrained
from minitune.attention import CausalAttention, Documents, attend, end_to_end
from minitune.errors import UserError
from minitune.loss import IGNORE
from minitune.model import Llama, rotary_tables

ROWS = [[7, 5, 12, 1], [1, 23, 1], [25]]  # lengths of the documents of each row
LENGTHS = [length for row in ROWS for length in row]
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

Call = Callable[[Llama, Tensor, Tensor, Documents], Tensor]


@pytest.fixture
def model(save_llama: Any) -> Llama:
    folder, _ = save_llama(rope_parameters=ROPE, attention_bias=True)
    return pretrained.load(folder).requires_grad_(True)


def packed_rows() -> tuple[Tensor, Tensor, Documents]:
    """Tokens (3, 25), positions (3, 25) and where documents end."""
    tokens = torch.randint(0, 101, (3, 25))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).view(3, 25)
    return tokens, positions, Documents.of(LENGTHS)


def spans() -> list[slice]:
    ends = Documents.of(LENGTHS).ends.tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def plainly(model: Llama, tokens: Tensor, positions: Tensor, documents: Documents) -> Tensor:
    return model(tokens, positions, documents)


def documents_dropped(model: Llama, tokens: Tensor, positions: Tensor, documents: Documents) -> Tensor:
    return model(tokens, positions)


def boundaries_off_by_one(model: Llama, tokens: Tensor, positions: Tensor, documents: Documents) -> Tensor:
    ends = documents.ends.clone()
    ends[1] += 1
    return model(tokens, positions, Documents(ends, documents.longest))


def logits_apart(model: Llama, call: Call) -> float:
    """The largest difference between logits in packed rows and alone, relative to the largest logit."""
    tokens, positions, documents = packed_rows()
    together = call(model, tokens, positions, documents).flatten(0, 1)
    alone = torch.cat([model(tokens.flatten()[None, span])[0] for span in spans()])
    return ((together - alone).abs().max() / alone.abs().max()).item()


def gradients_apart(model: Llama, call: Call) -> float:
    tokens, positions, documents = packed_rows()
    weight = torch.randn(75, 101)
    (call(model, tokens, positions, documents).flatten(0, 1) * weight).sum().backward()
    together = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for span in spans():
        (model(tokens.flatten()[None, span])[0] * weight[span]).sum().backward()
    alone = {name: parameter.grad for name, parameter in model.named_parameters()}
    return max(((together[name] - alone[name]).abs().max() / alone[name].abs().max()).item() for name in alone)


def seen_by_others(model: Llama, call: Call) -> int:
    """In how many documents any logit changes at all when all tokens of some other document change."""
    tokens, positions, documents = packed_rows()
    before = call(model, tokens, positions, documents).flatten(0, 1)
    count = 0
    for changed in range(len(LENGTHS)):
        other = tokens.clone().flatten()
        other[spans()[changed]] = (other[spans()[changed]] + torch.randint(1, 101, (LENGTHS[changed],))) % 101
        after = call(model, other.view_as(tokens), positions, documents).flatten(0, 1)
        for document, span in enumerate(spans()):
            same = torch.equal(before[span], after[span])
            if document == changed:
                assert not same
            else:
                count += not same
    return count


def test_packed_logits_are_those_of_documents_alone(model: Llama) -> None:
    assert logits_apart(model, plainly) < 1e-5


def test_packed_gradients_are_those_of_documents_alone(model: Llama) -> None:
    assert gradients_apart(model, plainly) < 1e-5


def test_the_packed_loss_is_the_sum_of_the_documents_losses(model: Llama) -> None:
    tokens, positions, documents = packed_rows()
    labels = torch.randint(0, 101, (3, 25))
    labels[torch.rand(3, 25) < 0.4] = IGNORE
    together = model(tokens, positions, documents, labels)
    alone = [model(tokens.flatten()[None, span], labels=labels.flatten()[None, span]) for span in spans()]
    assert together.item() == pytest.approx(sum(loss.item() for loss in alone), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_document_sees_another(model: Llama, dtype: torch.dtype, recompute: bool) -> None:
    model.to(dtype).train()
    if recompute:
        parallel.recompute_blocks(model.layers)
    assert seen_by_others(model, plainly) == 0


@pytest.mark.parametrize("wrong", [documents_dropped, boundaries_off_by_one])
def test_a_leak_would_be_caught(model: Llama, wrong: Call) -> None:
    assert logits_apart(model, wrong) > 1e-2
    assert gradients_apart(model, wrong) > 1e-2
    assert seen_by_others(model, wrong) > 0


def test_no_token_sees_what_comes_after_it(model: Llama) -> None:
    tokens, positions, documents = packed_rows()
    before = model(tokens, positions, documents)
    for place in range(25):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 101
        after = model(changed, positions, documents)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


def test_positions_restart_in_every_document(model: Llama) -> None:
    """The tables that blocks receive are bit for bit those of the documents alone; attention alone would not tell,
    since it sees distances only."""
    tokens, positions, documents = packed_rows()
    tables: list[tuple[Tensor, Tensor]] = []
    model.layers[-1].register_forward_pre_hook(lambda module, args: tables.append(args[1:3]))
    model(tokens, positions, documents)
    for span in spans():
        model(tokens.flatten()[None, span])
    together, *alone = tables
    for which in (0, 1):  # cosines, sines
        flat = together[which].flatten(0, 1)
        assert torch.equal(flat, torch.cat([table[which][0] for table in alone]))

    cos, _ = rotary_tables(model.config, torch.arange(25)[None].expand(3, -1))  # positions that do not restart
    assert not torch.equal(cos.flatten(0, 1), torch.cat([table[0][0] for table in alone]))


def test_a_batch_without_documents_has_one_in_each_row(model: Llama) -> None:
    tokens = torch.randint(0, 101, (3, 25))
    without, given = model(tokens), model(tokens, documents=Documents.of([25, 25, 25]))
    assert ((without - given).abs().max() / given.abs().max()) < 1e-6


# The attention core by itself


def drawn(K: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 25, 4, 10), torch.randn(3, 25, K, 10), torch.randn(3, 25, K, 10)


def in_words(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention one head and one token at a time, in fp64."""
    B, T, H, h = q.shape
    shared = H // k.shape[2]
    document = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    q, k, v = (x.double().flatten(0, 1) for x in (q, k, v))  # (B * T, heads, h)
    out = torch.zeros_like(q)
    for i in range(B * T):
        mine = [j for j in range(i + 1) if document[j] == document[i]]
        for head in range(H):
            scores = k[mine, head // shared] @ q[i, head] / h**0.5
            out[i, head] = scores.softmax(0) @ v[mine, head // shared]
    return out.view(B, T, H, h)


@pytest.mark.parametrize("K", [4, 2, 1])
def test_the_plain_core_is_the_definition(K: int) -> None:
    q, k, v = drawn(K)
    ours = CausalAttention()(q, k, v, Documents.of(LENGTHS))
    torch.testing.assert_close(ours.double(), in_words(q, k, v, LENGTHS), rtol=1e-5, atol=1e-6)
    ours = CausalAttention()(q, k, v, None)
    torch.testing.assert_close(ours.double(), in_words(q, k, v, [25, 25, 25]), rtol=1e-5, atol=1e-6)


def stand_in_kernel(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """What variable-length kernels promise: tokens end to end (N, heads, h), documents by their ends."""
    assert ends.dtype == torch.int32
    assert (ends[0], ends[-1]) == (0, len(q))
    assert longest >= ends.diff().max()
    parts = [attend(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in pairwise(ends.tolist())]
    return torch.cat(parts)


@pytest.mark.parametrize("documents", [Documents.of(LENGTHS), None], ids=["packed", "one a row"])
def test_fast_kernels_are_called_with_the_same_documents(documents: Documents | None) -> None:
    q, k, v = drawn(2)
    ours = end_to_end(stand_in_kernel, q, k, v, documents)
    torch.testing.assert_close(ours, CausalAttention()(q, k, v, documents), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", ["flash", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_need_a_gpu_are_refused_on_a_cpu(model: Llama, choice: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=rf"model.attention: {choice} needs a CUDA device and bfloat16"):
        attention.use(model, choice, torch.device("cpu"), dtype)


@pytest.mark.parametrize("choice", ["auto", "sdpa"])
def test_on_a_cpu_the_plain_core_stays(model: Llama, choice: str) -> None:
    assert attention.use(model, choice, torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert all(type(layer.self_attn.core) is CausalAttention for layer in model.layers)
