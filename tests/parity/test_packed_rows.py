"""From documents through packing and the model: whatever the documents, each is as if it were alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitune import pretrained
from minitune.attention import Documents
from minitune.data.corpus import Corpus
from minitune.data.packing import collate, rows
from minitune.loss import IGNORE
from minitune.model import Llama

WIDTH = 24

sets_of_documents = st.tuples(st.lists(st.integers(1, WIDTH), min_size=2, max_size=9), st.integers(0, 2**32 - 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """A random model, one for all examples."""
    import transformers

    folder: Path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=101, num_key_value_heads=2, max_position_embeddings=64, **shape)
    whole = transformers.LlamaForCausalLM(config)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(folder)
    return pretrained.load(folder)


def corpus_of(lengths: list[int], seed: int) -> Corpus:
    draw = np.random.default_rng(seed)
    return Corpus.from_documents((draw.integers(1, 101, n), draw.random(n) < 0.6) for n in lengths)


def changed(corpus: Corpus, which: int) -> Corpus:
    """Every token of one document is another."""
    documents = [corpus[number] for number in range(len(corpus))]
    ids, trained = documents[which]
    documents[which] = ((ids + 1 + np.arange(len(ids)) % 7) % 101, trained)
    return Corpus.from_documents(documents)


def by_document(values: Tensor, order: list[list[int]], corpus: Corpus) -> dict[int, Tensor]:
    """The stretch of each document in values (B, T, ...)."""
    found = {}
    for row, of_row in zip(order, values, strict=True):
        ends = np.cumsum([0, *corpus.lengths[row]]).tolist()
        found |= {document: of_row[a:b] for document, (a, b) in zip(row, pairwise(ends), strict=True)}
    return found


@torch.no_grad()
def logits(model: Llama, corpus: Corpus, order: list[list[int]], isolated: bool = True) -> dict[int, Tensor]:
    batch = collate(corpus, order, WIDTH, 0)
    width = batch.tokens.shape[1]
    documents = batch.documents if isolated else Documents.of([width] * len(order))
    return by_document(model(batch.tokens, batch.positions, documents), order, corpus)


def seen(model: Llama, lengths: list[int], seed: int, isolated: bool) -> bool:
    """Whether any logit of another document changes when one does."""
    corpus, which = corpus_of(lengths, seed), seed % len(lengths)
    order = list(rows(corpus.lengths, WIDTH, seed, packing=True))
    before = logits(model, corpus, order, isolated)
    after = logits(model, changed(corpus, which), order, isolated)
    assert sorted(before) == list(range(len(lengths)))
    assert not torch.equal(before[which], after[which])
    return any(not torch.equal(before[other], after[other]) for other in before if other != which)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets_of_documents)
def test_a_document_that_changes_changes_no_other(model: Llama, documents: tuple[list[int], int]) -> None:
    assert not seen(model, *documents, isolated=True)


def test_a_row_that_is_one_document_would_be_caught(model: Llama) -> None:
    assert any(seen(model, [5, 7, 4, 6], seed, isolated=False) for seed in range(4))


def losses(model: Llama, corpus: Corpus, packing: bool, seed: int) -> tuple[dict[int, float], int]:
    """The summed loss of each document, and how many tokens are learned."""
    order = list(rows(corpus.lengths, WIDTH, seed, packing))
    batch = collate(corpus, order, WIDTH if packing else None, 0)
    with torch.no_grad():
        predicted = model(batch.tokens, batch.positions, batch.documents).flatten(0, 1)
    each = torch.nn.functional.cross_entropy(predicted, batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
    spans = by_document(each.view(batch.labels.shape), order, corpus)
    return {document: loss.sum().item() for document, loss in spans.items()}, batch.loss_tokens


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets_of_documents)
def test_every_document_has_the_same_loss_packed_or_padded(model: Llama, documents: tuple[list[int], int]) -> None:
    corpus, seed = corpus_of(*documents), documents[1]
    packed, tokens = losses(model, corpus, packing=True, seed=seed)
    padded, same_tokens = losses(model, corpus, packing=False, seed=seed + 1)
    assert tokens == same_tokens == corpus.trained_tokens
    assert packed == pytest.approx(padded, rel=1e-5, abs=1e-5)
