"""The stream: every epoch all of the data once, in equal shares, and resumed exactly where it stopped."""

import json
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data.corpus import Corpus
from minitune.data.packing import Batch
from minitune.data.stream import Stream, deal, eval_batches
from minitune.errors import UserError

CAPACITY = 32


def make_corpus(documents: int, seed: int = 0) -> Corpus:
    """Each document begins with its own number, from 1 on, by which a batch shows what it holds."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 20, documents)
    return Corpus.from_documents(
        ([i + 1, *rng.integers(10_000, 20_000, n - 1)], rng.random(n) < 0.7) for i, n in enumerate(lengths)
    )


def make_stream(corpus: Corpus, **changes: int | bool) -> Stream:
    choices = {"max_seq_len": CAPACITY, "packing": True, "batch_size": 2, "accumulation": 3, "seed": 42}
    return Stream(corpus, pad_id=0, **(choices | changes))


def documents_in(batches: list[Batch]) -> list[int]:
    """Document numbers in batches, padding left out, in the order they lie there."""
    firsts = [batch.tokens.view(-1)[batch.documents.ends[:-1].long()] for batch in batches]
    return [number - 1 for number in torch.cat(firsts).tolist() if number]


def documents_of(rows: list[list[int]]) -> list[int]:
    return [document for row in rows for document in row]


def take_epoch(stream: Stream) -> list[list[Batch]]:
    return [stream.next_step() for _ in range(stream.steps_per_epoch)]


def equal(one: list[Batch], other: list[Batch]) -> bool:
    """Are two steps the same, tensor for tensor?"""
    return len(one) == len(other) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.positions, b.positions)
        and torch.equal(a.documents.ends, b.documents.ends)
        and a.loss_tokens == b.loss_tokens
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_is_another_permutation_of_all_documents(packing: bool) -> None:
    corpus = make_corpus(101)
    stream = make_stream(corpus, packing=packing)
    epochs = []
    for epoch in range(3):
        assert (stream.epoch, stream.step) == (epoch, 0)
        steps = take_epoch(stream)
        assert sum(batch.loss_tokens for step in steps for batch in step) == corpus.trained_tokens
        epochs.append([document for step in steps for document in documents_in(step)])
    assert all(sorted(order) == list(range(101)) for order in epochs)
    assert all(one != other for one, other in pairwise([list(range(101)), *epochs]))


def test_stream_depends_on_the_seed_alone() -> None:
    corpus = make_corpus(50)
    first, again, other = (take_epoch(make_stream(corpus, seed=seed)) for seed in (7, 7, 8))
    assert all(equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(equal(one, two) for one, two in zip(first, other, strict=True))


def test_rows_of_a_step_are_what_it_yields() -> None:
    stream = make_stream(make_corpus(101))
    for _ in range(2 * stream.steps_per_epoch):
        rows = stream.rows_of_step(stream.epoch, stream.step)
        assert documents_in(stream.next_step()) == documents_of(rows)


def test_looking_at_other_epochs_changes_nothing() -> None:
    straight, looked_at = make_stream(make_corpus(60)), make_stream(make_corpus(60))
    for step in range(2 * straight.steps_per_epoch):
        looked_at.rows_of_step(5 + step, 0)
        assert equal(straight.next_step(), looked_at.next_step())


def test_last_window_is_a_step_of_its_own() -> None:
    """7 documents as 7 rows, 1 a micro-batch, 4 micro-batches a step: 4 and 3, epoch after epoch."""
    corpus = make_corpus(7)
    stream = make_stream(corpus, packing=False, batch_size=1, accumulation=4)
    assert [len(stream.next_step()) for _ in range(6)] == [4, 3, 4, 3, 4, 3]
    assert len(documents_of(stream.rows_of_step(0, 1))) == 3


@settings(deadline=None, max_examples=20)
@given(
    documents=st.integers(1, 60),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    world=st.integers(1, 3),
    packing=st.booleans(),
    seed=st.integers(0, 999),
)
def test_ranks_share_the_data_in_equal_shapes(
    documents: int, batch_size: int, accumulation: int, world: int, packing: bool, seed: int
) -> None:
    corpus = make_corpus(documents, seed)
    choices = {"batch_size": batch_size, "accumulation": accumulation, "packing": packing}
    ranks = [make_stream(corpus, rank=rank, world=world, **choices) for rank in range(world)]

    # The number of steps in closed form: what a schedule counts on.
    steps = -(-ranks[0].rows_per_epoch // (batch_size * accumulation * world))
    assert {stream.steps_per_epoch for stream in ranks} == {steps}

    for epoch in range(2):
        seen: Counter[int] = Counter()
        for step in range(steps):
            assert {(stream.epoch, stream.step) for stream in ranks} == {(epoch, step)}
            shares = [stream.next_step() for stream in ranks]
            in_step = Counter(documents_of([documents_in(share) for share in shares]))
            assert in_step == Counter(documents_of(ranks[0].rows_of_step(epoch, step)))
            seen += in_step

            assert len({len(share) for share in shares}) == 1 <= len(shares[0]) <= accumulation
            shapes = {tuple(batch.tokens.shape) for share in shares for batch in share}
            if packing:
                assert shapes == {(batch_size, CAPACITY)}
            else:
                assert {B for B, _ in shapes} == {batch_size}
        assert seen == Counter(range(documents))  # the union is everything, and nothing is there twice


def test_equal_shares_need_empty_rows() -> None:
    """The control for the test above: 5 rows on 2 ranks are 3 and 2 without them."""
    rows = [[document] for document in range(5)]
    assert [len(rows[rank::2]) for rank in range(2)] == [3, 2]
    assert list(deal(rows, 2, 0, 2)) == [[[0], [2]], [[4], []]]
    assert list(deal(rows, 2, 1, 2)) == [[[1], [3]], [[], []]]


@pytest.mark.parametrize("packing", [True, False])
def test_resuming_at_every_step_of_three_epochs_goes_on_exactly(packing: bool) -> None:
    corpus = make_corpus(40)
    straight = make_stream(corpus, packing=packing)
    assert straight.rows_per_epoch % straight.rows_per_step  # the epochs end in a partial window
    states, steps = [], []
    for _ in range(3 * straight.steps_per_epoch):
        states.append(json.dumps(straight.state()))
        assert straight.state_at(len(steps)) == straight.state()
        steps.append(straight.next_step())
    for at, state in enumerate(states):
        resumed = make_stream(corpus, packing=packing)
        resumed.load(json.loads(state))
        assert all(equal(resumed.next_step(), step) for step in steps[at : at + straight.steps_per_epoch + 1])


@pytest.mark.parametrize("forgotten", ["epoch", "step"])
def test_resuming_needs_both_numbers(forgotten: str) -> None:
    """The control for the test above: a resume that forgets one of them goes on with other data."""
    stream = make_stream(make_corpus(40))
    for _ in range(stream.steps_per_epoch + 1):
        stream.next_step()
    resumed = make_stream(make_corpus(40))
    resumed.load({**stream.state(), forgotten: 0})
    assert not equal(resumed.next_step(), stream.next_step())


def test_another_number_of_ranks_takes_the_same_rows() -> None:
    """1 rank of 4 micro-batches, then 2 of 2, then 4 of 1, then 1 again with smaller micro-batches."""
    corpus = make_corpus(90)
    straight = make_stream(corpus, accumulation=4)
    expected = [Counter(documents_in(straight.next_step())) for _ in range(8)]
    state = make_stream(corpus, accumulation=4).state()
    found = []
    for world, batch_size, accumulation in [(1, 2, 4), (2, 2, 2), (4, 2, 1), (1, 1, 8)]:
        choices = {"batch_size": batch_size, "accumulation": accumulation, "world": world}
        ranks = [make_stream(corpus, rank=rank, **choices) for rank in range(world)]
        for stream in ranks:
            stream.load(state)
        for _ in range(2):
            found.append(Counter(documents_of([documents_in(stream.next_step()) for stream in ranks])))
        state = ranks[-1].state()
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_seq_len": 33}, "max_seq_len was 32 and is 33"),
        ({"packing": False}, "packing was True and is False"),
        ({"batch_size": 4}, "rows_per_step was 6 and is 12"),
        ({"accumulation": 1}, "rows_per_step was 6 and is 2"),
        ({"world": 2}, "rows_per_step was 6 and is 12"),
        ({"seed": 43}, "seed was 42 and is 43"),
    ],
)
def test_a_state_of_other_settings_is_refused(changes: dict[str, int | bool], field: str) -> None:
    corpus = make_corpus(40)
    with pytest.raises(UserError, match=field):
        make_stream(corpus, **changes).load(make_stream(corpus).state())


def test_a_state_of_other_data_is_refused() -> None:
    corpus = make_corpus(40)
    state = make_stream(corpus).state()
    with pytest.raises(UserError, match="documents was 40 and is 41; tokens was"):
        make_stream(make_corpus(41)).load(state)
    documents = [corpus[number] for number in range(40)]
    documents[3][0][1] += 1
    corrected = Corpus.from_documents(documents)  # as many documents and tokens, but not the same ones
    with pytest.raises(UserError, match=r"settings: digest was \w+ and is \w+; put"):
        make_stream(corrected).load(state)


def test_a_damaged_state_is_refused() -> None:
    stream = make_stream(make_corpus(40))
    state = stream.state()
    for key in state:
        with pytest.raises(UserError, match=key):
            stream.load({name: value for name, value in state.items() if name != key})
    for key, value in [
        ("epoch", -1),
        ("epoch", "1"),
        ("step", -1),
        ("step", stream.steps_per_epoch),
        ("step", 1.0),
    ]:
        with pytest.raises(UserError, match=f"{key} is {value!r}"):
            stream.load({**state, key: value})
    assert stream.state() == state


def test_a_stream_needs_documents() -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        make_stream(Corpus.from_documents([]))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_everything_once_and_always_the_same(packing: bool, world: int) -> None:
    corpus = make_corpus(37)
    choices = {"max_seq_len": CAPACITY, "packing": packing, "batch_size": 2, "pad_id": 0, "world": world}
    ranks = [list(eval_batches(corpus, **choices, rank=rank)) for rank in range(world)]
    assert sorted(documents_of([documents_in(batches) for batches in ranks])) == list(range(37))
    assert len({len(batches) for batches in ranks}) == 1
    assert sum(batch.loss_tokens for batches in ranks for batch in batches) == corpus.trained_tokens
    assert equal(ranks[0], list(eval_batches(corpus, **choices, rank=0)))


def test_evaluation_is_lazy_and_may_be_empty() -> None:
    choices = {"max_seq_len": CAPACITY, "packing": True, "batch_size": 2, "pad_id": 0}
    assert len(list(islice(eval_batches(make_corpus(37), **choices), 1))) == 1
    assert list(eval_batches(Corpus.from_documents([]), **choices)) == []
