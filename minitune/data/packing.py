"""Tokenised documents, the rows they are packed into, and the tensors of a batch of rows.

A row holds whole documents only. They never see each other: attention is told where each one ends
(`Documents`), positions restart at 0 with each, and no label reaches over a seam.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minitune.attention import Documents
from minitune.loss import IGNORE
from minitune.seeds import derive


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents laid end to end; document i is tokens[offsets[i] : offsets[i + 1]].

    The arrays may be any that index like numpy's, memory-mapped ones included.
    """

    tokens: np.ndarray  # (N,) int32
    trained: np.ndarray  # (N,) bool: is this token to be learned
    offsets: np.ndarray  # (documents + 1,) int64

    @staticmethod
    def from_documents(documents: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Corpus:
        """Lay documents, each its token ids and which of them are to be learned, end to end."""
        tokens, trained, offsets = [np.empty(0, np.int32)], [np.empty(0, np.bool_)], [0]
        for ids, learn in documents:
            if len(ids) == 0 or len(ids) != len(learn):
                raise ValueError(f"document {len(offsets) - 1} has {len(ids)} tokens and {len(learn)} marks")
            tokens.append(np.asarray(ids, np.int32))
            trained.append(np.asarray(learn, np.bool_))
            offsets.append(offsets[-1] + len(ids))
        return Corpus(np.concatenate(tokens), np.concatenate(trained), np.array(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and marks of one document."""
        span = slice(self.offsets[document], self.offsets[document + 1])
        return self.tokens[span], self.trained[span]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return np.diff(self.offsets)

    @cached_property
    def trained_tokens(self) -> int:
        """Loss tokens: those to be learned, except a document's first, which nothing comes before."""
        return int(self.trained.sum() - self.trained[self.offsets[:-1]].sum())

    @cached_property
    def digest(self) -> str:
        """A fingerprint of every token, mark and seam."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.tokens, self.trained):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def rows(lengths: np.ndarray, capacity: int, seed: int, packing: bool) -> list[list[int]]:
    """The rows of one epoch, as document numbers: packed, or each document by itself; shuffled either way."""
    if packing:
        return pack(lengths, capacity, seed)
    refuse_overlong(lengths, capacity)
    return [[document] for document in shuffled(len(lengths), seed).tolist()]


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Put whole documents, each once, into as few rows of `capacity` tokens as best-fit decreasing finds.

    The longest document comes first, and each goes where it leaves the least space (Johnson, "Near-optimal
    bin packing algorithms", 1973: never over 11/9 of the fewest rows, plus four). The seed decides among
    equal lengths, the order of the rows and the order within a row. The number of rows does not depend on
    it: all that a document meets is the spaces left so far, and those follow from the lengths alone.
    """
    refuse_overlong(lengths, capacity)
    order = shuffled(len(lengths), derive(seed, "ties"))
    order = order[np.argsort(-lengths[order], kind="stable")]

    packed: list[list[int]] = []
    spaces: list[int] = []  # the distinct spaces left, ascending
    with_space: dict[int, list[list[int]]] = {}  # space left -> the rows that have it
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        best = bisect_left(spaces, length)
        if best < len(spaces):
            space = spaces[best]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[best]
        else:
            space, row = capacity, []
            packed.append(row)
        row.append(document)
        space -= length
        if space not in with_space:
            insort(spaces, space)
            with_space[space] = []
        with_space[space].append(row)

    place = shuffled(len(lengths), derive(seed, "places")).tolist()
    for row in packed:
        row.sort(key=place.__getitem__)
    return [packed[row] for row in shuffled(len(packed), derive(seed, "rows")).tolist()]


def fill(lengths: np.ndarray, number_of_rows: int, capacity: int) -> float:
    """The share of the rows' tokens that belongs to documents; the rest is padding."""
    return int(lengths.sum()) / (number_of_rows * capacity)


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
    if width is None:
        width = max([1, *(sum(len(corpus[document][0]) for document in row) for row in rows_of_documents)])
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
        sum(len(corpus[document][0]) for row in rows_of_documents for document in row),
    )
