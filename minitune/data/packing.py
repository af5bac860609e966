"""Tokenised documents, the rows they are packed into, and the tensors of a batch of rows.

A row holds whole documents only. They never see each other: attention is told where each one ends
(`Documents`), positions restart at 0 with each, and no label reaches over a seam.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from torch import Tensor

from minitune.attention import Documents
from minitune.data.corpus import Corpus
from minitune.loss import IGNORE
from minitune.seeds import derive


@dataclass(frozen=True, eq=False)
class Rows(Sequence[list[int]]):
    """The rows of an epoch as document numbers: row i is documents[ends[i] : ends[i + 1]]. Twelve bytes a document."""

    documents: np.ndarray  # (documents,) int32
    ends: np.ndarray  # (rows + 1,) int64, from 0 on

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.documents[self.ends[row] : self.ends[row + 1]].tolist()


def rows(lengths: np.ndarray, capacity: int, seed: int, packing: bool) -> Rows:
    """The rows of one epoch: packed, or each document by itself; shuffled either way."""
    if packing:
        return pack(lengths, capacity, seed)
    refuse_overlong(lengths, capacity)
    return Rows(shuffled(len(lengths), seed).astype(np.int32), np.arange(len(lengths) + 1))


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Rows:
    """Put whole documents, each once, into as few rows of `capacity` tokens as best-fit decreasing finds.

    The seed decides among equal lengths, the order of the rows and the order within a row. The number of rows does
    not depend on it: all that a document meets is the spaces left so far, and those follow from the lengths alone.
    """
    refuse_overlong(lengths, capacity)
    order = shuffled(len(lengths), derive(seed, "ties"))
    order = order[np.argsort(-lengths[order], kind="stable")].astype(np.int32)
    row_of, number_of_rows = best_fit(lengths[order], capacity)

    turn = np.empty(number_of_rows, np.int32)  # when each row comes
    turn[shuffled(number_of_rows, derive(seed, "rows"))] = np.arange(number_of_rows, dtype=np.int32)
    place = shuffled(len(lengths), derive(seed, "places"))
    turns = turn[row_of[place]]
    documents = order[place][np.argsort(turns, kind="stable")]
    return Rows(documents, np.cumsum(np.bincount(turns + 1, minlength=number_of_rows + 1)))


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each document, (documents,) int32, and the number of rows; lengths must not rise.

    Each document goes where it leaves the least space (Johnson, "Near-optimal bin packing algorithms", 1973: never
    over 11/9 of the fewest rows, plus four). Equal lengths are placed at once: the row with the least space that
    fits one has still the least after it took it, so it takes as many as fit.
    """
    row_of, number_of_rows = np.empty(len(lengths), np.int32), 0
    spaces: list[int] = []  # the distinct spaces left, ascending
    with_space: dict[int, list[np.ndarray]] = {}  # space left -> the rows that have it

    def put(rows: np.ndarray, space: int) -> None:
        if len(rows) and space:
            if space not in with_space:
                insort(spaces, space)
                with_space[space] = []
            with_space[space].append(rows)

    for at, end in runs(lengths):
        length = int(lengths[at])
        while at < end:
            best = bisect_left(spaces, length)
            space = spaces.pop(best) if best < len(spaces) else capacity
            each = space // length
            wanted = -(-(end - at) // each)
            if space in with_space:
                there = np.concatenate(with_space.pop(space))
            else:
                there = np.arange(number_of_rows, number_of_rows + wanted, dtype=np.int32)
                number_of_rows += wanted
            taken = min(len(there), wanted)
            documents = min(end - at, taken * each)
            row_of[at : at + documents] = np.repeat(there[:taken], each)[:documents]
            at += documents

            full = documents // each  # rows that took as many as fit; at most one more took some
            put(there[:full], space - each * length)
            put(there[full:taken], space - (documents - full * each) * length)
            put(there[taken:], space)
    return row_of, number_of_rows


def runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of each stretch of equal values."""
    changes = np.flatnonzero(np.diff(values)) + 1
    return pairwise([0, *changes.tolist(), len(values)]) if len(values) else iter(())


def fill(lengths: np.ndarray, number_of_rows: int, capacity: int) -> float:
    """The share of the rows' tokens that belongs to documents; the rest is padding."""
    return int(lengths.sum(dtype=np.int64)) / (number_of_rows * capacity)


def shuffled(n: int, seed: int) -> np.ndarray:
    """The numbers below n in an order drawn from the seed.

    Drawn from raw bits, whose stream numpy promises to keep in every version; that of `Generator.permutation`
    it does not, and a run must be able to resume after an upgrade.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


def refuse_overlong(lengths: np.ndarray, capacity: int) -> None:
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"document {lengths.argmax()} has {lengths.max()} tokens, a row holds {capacity}")


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model: B rows of T tokens."""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the token to predict after this one; IGNORE where nothing is learned
    learned: Tensor  # (loss_tokens,) int64: the places, over all B T, whose labels are not IGNORE
    positions: Tensor  # (B, T) int64: place in the document
    documents: Documents  # along the rows laid end to end; each row's padding is a document of its own
    document_tokens: int  # tokens that are not padding

    @property
    def loss_tokens(self) -> int:
        return len(self.learned)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. To a GPU it goes by way of page-locked memory, so that nothing waits for it."""

        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        documents = Documents(moved(self.documents.ends), self.documents.longest)
        tensors = (self.tokens, self.labels, self.learned, self.positions)
        return Batch(*map(moved, tensors), documents, self.document_tokens)


def collate(corpus: Corpus, rows_of_documents: list[list[int]], width: int | None, pad_id: int) -> Batch:
    """The batch of these rows, each a list of document numbers; a row of none is all padding.

    Rows are `width` tokens wide, or as wide as the longest of them where `width` is None.
    """
    lengths_of_rows = [int(corpus.lengths[row].sum()) for row in rows_of_documents]
    width = width or max([1, *lengths_of_rows])
    shape = (len(rows_of_documents), width)  # (B, T)
    tokens, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    positions = np.empty(shape, np.int64)
    spans: list[int] = []
    for b, row in enumerate(rows_of_documents):
        start = 0
        for document in row:
            ids, trained = corpus[document]
            end = start + len(ids)
            tokens[b, start:end] = ids
            labels[b, start : end - 1] = np.where(trained[1:], ids[1:], IGNORE)  # the last predicts nothing
            positions[b, start:end] = np.arange(len(ids))
            spans.append(len(ids))
            start = end
        if start < width:
            positions[b, start:] = np.arange(width - start)
            spans.append(width - start)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy((labels != IGNORE).reshape(-1).nonzero()[0]),
        torch.from_numpy(positions),
        Documents.of(spans),
        sum(lengths_of_rows),
    )
