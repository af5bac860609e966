"""Tokenised documents, in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

MARK = np.uint32(1 << 31)  # set on a token id: it is to be learned


class Tokens(Protocol):
    """Marked token ids that are read a stretch at a time: an array, or a file of the store."""

    def __getitem__(self, span: slice) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents, each a stretch of `marked`: lengths[i] tokens from starts[i] on. A document may stand here twice."""

    marked: Tokens  # (N,) uint32
    starts: np.ndarray  # (documents,) int64
    lengths: np.ndarray  # (documents,) int32
    trained_tokens: int  # loss tokens: those to be learned, except a document's first, which nothing comes before
    marked_digest: str  # of all of `marked`

    @staticmethod
    def from_documents(documents: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Corpus:
        """Lay documents, each its token ids and which of them are to be learned, end to end."""
        stretches, lengths, trained_tokens = [np.empty(0, np.uint32)], [], 0
        for ids, learn in documents:
            if len(ids) == 0 or len(ids) != len(learn):
                raise ValueError(f"document {len(lengths)} has {len(ids)} tokens and {len(learn)} marks")
            stretches.append(mark(ids, learn))
            lengths.append(len(ids))
            trained_tokens += int(np.count_nonzero(learn[1:]))
        marked = np.concatenate(stretches)
        ends = np.cumsum(lengths, dtype=np.int64)
        digest = hashlib.sha256(marked).hexdigest()
        return Corpus(marked, ends - lengths, np.array(lengths, np.int32), trained_tokens, digest)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (T,) int32 and marks (T,) bool of one document."""
        start = int(self.starts[document])
        return unmark(self.marked[start : start + int(self.lengths[document])])

    @property
    def tokens(self) -> int:
        """Those of all documents."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def digest(self) -> str:
        """A fingerprint of every token, mark and seam."""
        digest = hashlib.sha256(self.marked_digest.encode())
        for array in (self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def mark(ids: Sequence[int], trained: Sequence[bool]) -> np.ndarray:
    """Token ids with the highest bit set on those to be learned. (T,) uint32"""
    return np.asarray(ids, np.uint32) | np.asarray(trained, np.bool_) * MARK


def unmark(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (T,) int32 and marks (T,) bool."""
    return (marked & ~MARK).astype(np.int32), marked >= MARK
