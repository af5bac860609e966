"""Packing: every document whole and once, full rows, and labels that stay inside their document."""

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.config import DataConfig
from minitune.data import prepare
from minitune.data.corpus import Corpus
from minitune.data.packing import IGNORE, Batch, collate, fill, pack, rows, shuffled
from minitune.data.store import TokenFile
from minitune.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
PAD = 0


@st.composite
def corpora(draw: st.DrawFn, longest: int = 40) -> Corpus:
    """Documents of distinct random tokens (never PAD), some of them to be learned."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=30))
    return make_corpus(lengths, draw(st.integers(0, 2**32 - 1)))


def make_corpus(lengths: list[int], seed: int = 0) -> Corpus:
    rng = np.random.default_rng(seed)
    return Corpus.from_documents((rng.integers(1, 32000, n), rng.random(n) < 0.6) for n in lengths)


def realistic_lengths(n: int, capacity: int) -> np.ndarray:
    """Lengths as instruction data has them: log-normal, median 150 tokens, a long tail."""
    return np.clip(np.random.default_rng(5).lognormal(5.0, 0.9, n), 8, capacity).astype(np.int64)


def pairs_learned(batch: Batch) -> Counter[tuple[int, int, int]]:
    """Every (position, token, label) of a batch that is learned, as a multiset."""
    at = batch.labels != IGNORE
    columns = (batch.positions[at].tolist(), batch.tokens[at].tolist(), batch.labels[at].tolist())
    return Counter(zip(*columns, strict=True))


def pairs_of_documents(corpus: Corpus) -> Counter[tuple[int, int, int]]:
    """What `pairs_learned` must be, from the documents one token at a time."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for document in range(len(corpus)):
        ids, trained = (array.tolist() for array in corpus[document])
        pairs.update((i - 1, ids[i - 1], ids[i]) for i in range(1, len(ids)) if trained[i])
    return pairs


def labels_across_the_seam(corpus: Corpus, row: list[int], width: int) -> torch.Tensor:
    """The mutant: labels made by shifting the finished row, as is often done. (1, T)"""
    ids = np.concatenate([corpus[d][0] for d in row])
    trained = np.concatenate([corpus[d][1] for d in row])
    labels = np.full((1, width), IGNORE, np.int64)
    labels[0, : len(ids) - 1] = np.where(trained[1:], ids[1:], IGNORE)
    return torch.from_numpy(labels)


# The corpus


def test_corpus_keeps_documents_as_given() -> None:
    documents = [([5, 6, 7], [False, True, True]), ([8], [True]), ([9, 10], [True, False])]
    corpus = Corpus.from_documents(iter(documents))
    assert [tuple(array.tolist() for array in corpus[i]) for i in range(len(corpus))] == documents
    ids, trained = corpus[0]
    assert (ids.dtype, trained.dtype, corpus.starts.dtype, corpus.lengths.dtype) == (
        np.int32,
        np.bool_,
        np.int64,
        np.int32,
    )
    assert (corpus.lengths.tolist(), corpus.tokens) == ([3, 1, 2], 6)
    assert corpus.trained_tokens == 2  # not the first tokens 8 and 9, which nothing predicts


def test_corpus_digest_sees_every_change() -> None:
    documents = [([5, 6, 7], [False, True, True]), ([8, 9], [False, True])]
    changed = [
        [([5, 6, 4], [False, True, True]), ([8, 9], [False, True])],  # a token
        [([5, 6, 7], [False, False, True]), ([8, 9], [False, True])],  # a mark
        [([5, 6], [False, True]), ([7, 8, 9], [True, False, True])],  # a seam
        documents[::-1],  # the order
    ]
    digests = {Corpus.from_documents(each).digest for each in [documents, *changed]}
    assert len(digests) == 5
    assert Corpus.from_documents(documents).digest in digests


@pytest.mark.parametrize("document", [([], []), ([1, 2], [True])])
def test_corpus_refuses_malformed_documents(document: tuple[list[int], list[bool]]) -> None:
    with pytest.raises(ValueError, match="document 1 has"):
        Corpus.from_documents([([1], [True]), document])


def test_corpus_may_be_empty() -> None:
    corpus = Corpus.from_documents([])
    assert (len(corpus), corpus.tokens, corpus.trained_tokens) == (0, 0, 0)
    assert list(rows(corpus.lengths, 8, 0, packing=True)) == list(rows(corpus.lengths, 8, 0, packing=False)) == []


# Rows


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(0, 2**63 - 1), st.booleans())
def test_each_document_stands_in_one_row_and_rows_fit(lengths: list[int], seed: int, packing: bool) -> None:
    lengths = np.array(lengths, np.int64)
    shuffled_rows = list(rows(lengths, 64, seed, packing))
    assert sorted(document for row in shuffled_rows for document in row) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= 64 for row in shuffled_rows)
    assert list(rows(lengths, 64, seed, packing)) == shuffled_rows
    assert packing or all(len(row) == 1 for row in shuffled_rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(0, 2**63 - 1), st.integers(0, 9))
def test_number_of_rows_depends_on_the_lengths_alone(lengths: list[int], seed: int, order: int) -> None:
    reordered = np.random.default_rng(order).permutation(lengths)
    assert len(pack(np.array(lengths), 64, seed)) == len(pack(reordered, 64, seed + 1))


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(0, 2**63 - 1))
def test_pack_is_best_fit_decreasing(lengths: list[int], seed: int) -> None:
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append(min(fitting, default=64) - length)
    packed = pack(np.array(lengths, np.int64), 64, seed)
    assert sorted(64 - sum(lengths[document] for document in row) for row in packed) == sorted(spaces)


def first_fit(lengths: np.ndarray, capacity: int, seed: int) -> int:
    """The control for the two tests about row counts: rows of first-fit in shuffled order."""
    spaces: list[int] = []
    for length in lengths[shuffled(len(lengths), seed)].tolist():
        row = next((i for i, space in enumerate(spaces) if space >= length), None)
        if row is None:
            spaces.append(capacity - length)
        else:
            spaces[row] -= length
    return len(spaces)


def test_rows_are_full_and_equally_many_where_first_fit_is_not() -> None:
    lengths = np.random.default_rng(3).integers(200, 1100, 600)
    best = {len(pack(lengths, 2048, seed)) for seed in range(8)}
    first = {first_fit(lengths, 2048, seed) for seed in range(8)}
    assert len(best) == 1
    assert len(first) > 1
    assert max(best) < min(first)
    assert fill(lengths, max(best), 2048) > 0.98


def test_realistic_lengths_fill_rows() -> None:
    lengths = realistic_lengths(5000, 2048)
    assert fill(lengths, len(pack(lengths, 2048, 0)), 2048) >= 0.98
    assert fill(lengths, len(rows(lengths, 2048, 0, packing=False)), 2048) < 0.2


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's pieces, with a chat template of the simplest kind."""
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(DATA / "llama2_tokenizer.model", folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    about = {"tokenizer_class": "LlamaTokenizer", "chat_template": template, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return load_tokenizer(folder)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")
@pytest.mark.parametrize(
    "name",
    [
        "alpaca_en_demo.json",
        "alpaca_zh_demo.json",
        "c4_demo.jsonl",
        "glaive_toolcall_en_demo.json",
        "gpteacher_roleplay_alpaca.json",
        "gsm8k_test.jsonl",
        "gsm8k_train.jsonl",
        "v1_sft_demo.jsonl",
        "wiki_demo.txt",
    ],
)
def test_real_sets_fill_rows(llama2: Tokenizer, name: str) -> None:
    """At least 98 % of 2048, where the tokens there are could fill so much of the fewest rows that hold them."""
    columns = {"question": "instruction", "answer": "output"} if name.startswith("gsm8k") else {}
    cfg = DataConfig(train=(str(DATA / name),), columns=columns, eval_fraction=0.0, checks="warn", bad_rows="skip")
    corpus = prepare(cfg, llama2).train
    number_of_rows = len(pack(corpus.lengths, 2048, 0))
    fewest = -(-corpus.tokens // 2048)
    if fill(corpus.lengths, fewest, 2048) < 0.98:
        assert name == "wiki_demo.txt"  # eight documents, in four rows at best
        assert number_of_rows <= fewest + 1
        return
    assert fill(corpus.lengths, number_of_rows, 2048) >= 0.98


def test_packing_is_fast() -> None:
    """A loop over the documents would take a second for each million, and as many lists."""
    lengths = realistic_lengths(2_000_000, 2048)
    start = time.perf_counter()
    packed = pack(lengths, 2048, 0)
    assert time.perf_counter() - start < 15.0
    assert fill(lengths, len(packed), 2048) >= 0.98
    assert packed.documents.nbytes + packed.ends.nbytes < 12 * len(lengths)


def test_seeds_shuffle_ties_rows_and_places() -> None:
    lengths = np.repeat([30, 20, 10, 7], 50)
    one, other = pack(lengths, 64, 1), pack(lengths, 64, 2)
    assert {frozenset(row) for row in one} != {frozenset(row) for row in other}  # other neighbours
    fills = [int(lengths[row].sum()) for row in one]
    assert fills != sorted(fills, reverse=True)  # the emptiest rows are not last
    assert any(list(lengths[row]) != sorted(lengths[row], reverse=True) for row in one)  # nor the shortest


def test_shuffling_is_even() -> None:
    """Each of 5 numbers comes first about a fifth of the time: 1000 draws, 5 standard deviations."""
    firsts = Counter(int(shuffled(5, seed)[0]) for seed in range(1000))
    assert all(abs(firsts[i] - 200) < 63 for i in range(5))


def test_shuffle_is_pinned() -> None:
    """A changed order would make resumed runs repeat and miss documents."""
    assert shuffled(8, 42).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]


@pytest.mark.parametrize("packing", [True, False])
def test_overlong_documents_are_refused(packing: bool) -> None:
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a row holds 8"):
        rows(np.array([8, 9, 3]), 8, 0, packing)


# Batches


@settings(deadline=None)
@given(corpora(), st.integers(0, 1000), st.booleans())
def test_batch_holds_the_documents_and_nothing_else(corpus: Corpus, seed: int, packing: bool) -> None:
    shuffled_rows = rows(corpus.lengths, 40, seed, packing)
    batch = collate(corpus, [*shuffled_rows, []], 40 if packing else None, PAD)
    width = 40 if packing else int(corpus.lengths.max())
    assert batch.tokens.shape == batch.labels.shape == (len(shuffled_rows) + 1, width)
    assert {batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype} == {torch.int64}

    ends = batch.documents.ends
    assert (ends[0].item(), ends[-1].item(), ends.dtype) == (0, batch.tokens.numel(), torch.int32)
    spans = (ends[1:] - ends[:-1]).tolist()
    assert batch.documents.longest >= max(spans)
    found = iter(zip(batch.tokens.view(-1).split(spans), batch.positions.view(-1).split(spans), strict=True))
    for row in [*shuffled_rows, []]:
        for document in row:
            tokens, positions = next(found)
            assert tokens.tolist() == corpus[document][0].tolist()
            assert positions.tolist() == list(range(len(tokens)))
        padding = width - int(corpus.lengths[row].sum())
        if padding:
            tokens, positions = next(found)
            assert (tokens.tolist(), positions.tolist()) == ([PAD] * padding, list(range(padding)))
    assert next(found, None) is None


@settings(deadline=None)
@given(corpora(), st.integers(0, 1000), st.booleans())
def test_labels_are_the_next_tokens_of_the_same_document(corpus: Corpus, seed: int, packing: bool) -> None:
    batch = collate(corpus, rows(corpus.lengths, 40, seed, packing), 40 if packing else None, PAD)
    assert pairs_learned(batch) == pairs_of_documents(corpus)
    assert batch.loss_tokens == corpus.trained_tokens == (batch.labels != IGNORE).sum().item()


def test_labels_do_not_depend_on_neighbours_unless_they_cross_the_seam() -> None:
    ids = [make_corpus([5, 9, 7], seed=1)[document][0] for document in range(3)]
    corpus = Corpus.from_documents((each, [True] * len(each)) for each in ids)
    batches = [collate(corpus, [row], 24, PAD) for row in ([0, 1, 2], [1, 0, 2])]
    assert pairs_learned(batches[0]) == pairs_learned(batches[1]) == pairs_of_documents(corpus)

    mutants = [
        replace(b, labels=labels_across_the_seam(corpus, row, 24))
        for b, row in zip(batches, ([0, 1, 2], [1, 0, 2]), strict=True)
    ]
    assert pairs_learned(mutants[0]) != pairs_learned(mutants[1])
    assert all(pairs_learned(mutant) != pairs_of_documents(corpus) for mutant in mutants)


def test_known_batch() -> None:
    corpus = Corpus.from_documents([([11, 12, 13], [True, False, True]), ([21, 22], [False, True])])
    batch = collate(corpus, [[1, 0], []], 7, PAD)
    assert batch.tokens.tolist() == [[21, 22, 11, 12, 13, 0, 0], [0] * 7]
    assert batch.labels.tolist() == [[22, -100, -100, 13, -100, -100, -100], [-100] * 7]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.documents.ends.tolist() == [0, 2, 5, 7, 14]
    assert batch.loss_tokens == 2


def test_batch_of_empty_rows_has_a_shape() -> None:
    batch = collate(make_corpus([5]), [[], []], None, PAD)
    assert (batch.tokens.shape, batch.loss_tokens, batch.documents.ends.tolist()) == ((2, 1), 0, [0, 1, 2])


def test_rows_wider_than_the_batch_are_refused() -> None:
    with pytest.raises(ValueError):
        collate(make_corpus([5, 4]), [[0, 1]], 8, PAD)


def test_batch_moves_whole() -> None:
    batch = collate(make_corpus([5, 4]), [[0, 1]], 10, PAD)
    moved = batch.to(torch.device("meta"))
    tensors = (moved.tokens, moved.labels, moved.positions, moved.documents.ends)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.loss_tokens, moved.documents.longest) == (batch.loss_tokens, batch.documents.longest)


def test_a_corpus_on_disk_gives_the_same_batch(tmp_path: Path) -> None:
    corpus = make_corpus([5, 9, 7, 3])
    corpus.marked.tofile(tmp_path / "marked")
    stored = replace(corpus, marked=TokenFile(tmp_path / "marked"))
    order = rows(stored.lengths, 12, 4, packing=True)
    one, other = collate(stored, order, 12, PAD), collate(corpus, order, 12, PAD)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)


def test_a_document_may_stand_twice_in_a_corpus() -> None:
    corpus = make_corpus([5, 9, 7])
    twice = replace(corpus, starts=corpus.starts[[0, 0, 2]], lengths=corpus.lengths[[0, 0, 2]])
    assert [twice[number][0].tolist() for number in range(3)] == [corpus[number][0].tolist() for number in (0, 0, 2)]
    assert twice.digest != corpus.digest


def test_rows_are_indexed_as_a_list_is() -> None:
    packed = pack(np.array([3, 4, 5, 6, 2]), 8, 0)
    as_list = list(packed)
    assert [packed[number] for number in range(len(packed))] == as_list == packed[:]
    assert packed[1:3] == as_list[1:3] and packed[-1:] == as_list[-1:] and packed[9:] == []
    with pytest.raises(IndexError):
        packed[len(packed)]
