"""A chunk of a file -> its documents' tokens, and a table that says of each document what decides its fate.

This is the part that many processes do at once; nothing here imports torch.
"""

import gc
import hashlib
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from threading import Event

import numpy as np

from minitune.config import DataConfig
from minitune.data.categories import category_of
from minitune.data.chat_template import shows_tools
from minitune.data.corpus import MARK, mark
from minitune.data.duplicates import KEYS, said, sketches
from minitune.data.examples import Example, Text, only_answer, texts
from minitune.data.formats import parse
from minitune.data.looks import answer_key, look
from minitune.data.objects import Row, RowError
from minitune.data.readers import Chunk, Place, rows_of
from minitune.data.templates import Document, documents_of
from minitune.tokenizer import Tokenizer

AT_ONCE = 512  # rows whose texts are encoded together
COLUMNS: dict[str, str] = {  # of the table: what is known of an entry, a document or a row that gives none
    "file": "<u2",  # which of the recipe's files
    "number": "<i8",  # of its line or row there
    "place": "<i8",  # its first byte there
    "size": "<i8",  # bytes
    "part": "<i4",  # 0: the first document of its row
    "exact": "<u8",  # hash of its tokens and marks
    "content": "<u8",  # hash of what its row says, white space and the spelling of accents aside
    "start": "<i8",  # its first token in the store
    "tokens": "<i4",  # that it has there
    "whole": "<i4",  # that it had before it was cut
    "trained": "<i4",  # loss tokens
    "flags": "<u1",
    "category": "<i4",
    "looks": "<u2",  # what is odd about its row: looks.Look
    "answer": "<u8",  # hash of what its row answers
}
BAD, CUT, STOPS, HIDES_TOOLS, ONE_ANSWER, RAW = 1, 2, 4, 8, 16, 32  # flags
NOTHING = Document([], [])


@dataclass(frozen=True)
class Task:
    """A chunk to tokenise."""

    chunk: Chunk
    file: int  # which of the recipe's files it is of
    format: str  # of its rows; never auto


@dataclass
class Portion:
    """What became of a chunk."""

    columns: dict[str, np.ndarray]  # each (entries,)
    sketches: np.ndarray  # (entries, KEYS) uint64 of each row's first document, else 0; or (0, KEYS)
    marked: np.ndarray  # (tokens,) uint32: see corpus.MARK
    categories: list[str]  # column `category` counts these
    reasons: list[tuple[str, str]] = field(default_factory=list)  # key path and sentence, of each BAD entry in turn


class Left(Exception):
    """A chunk that nobody waits for any more."""


def tokenise(task: Task, cfg: DataConfig, tokenizer: Tokenizer, ended: Event | None = None) -> Portion:
    """Read, check and tokenise the rows of a chunk.

    Args:
        ended: by which another thread says that nobody waits for it; then Left is raised, some hundred rows later.
    """
    with uncollected():
        return portion_of(task, cfg, tokenizer, ended or Event())


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block Python looks for no cycles among objects: a chunk makes lists by the hundred thousand and no
    cycles, and looking through them again and again takes a sixth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def portion_of(task: Task, cfg: DataConfig, tokenizer: Tokenizer, ended: Event) -> Portion:
    entries: list[dict[str, int]] = []
    kept: list[Document] = []  # of each entry; nothing, where it gives no tokens
    categories: dict[str, int] = {}
    reasons: list[tuple[str, str]] = []
    compared: dict[int, str] = {}  # entry -> the text that near duplicates are found by

    for place, row, example, made in documents_of_rows(task, cfg, tokenizer, ended):
        stands = {"number": place.number, "place": place.start, "size": place.size}
        if isinstance(made, RowError):
            reasons.append((made.key, str(made)))
            entries.append(stands | {"flags": BAD, "category": -1})
            kept.append(NOTHING)
            continue
        if cfg.near_duplicates != "off":
            compared[len(entries)] = said(example)
        category = categories.setdefault(category_of(row, example, cfg.category), len(categories))
        stands |= {"content": content_hash(example), "looks": look(example), "answer": answer_key(example)}
        stands |= {"category": category, "flags": flags_of(example, tokenizer)}
        for part, whole in enumerate(made):
            document = whole if len(whole.ids) <= cfg.max_seq_len else overlong(whole, cfg)
            entries.append(stands | {"part": part, "whole": len(whole.ids)})
            entries[-1]["flags"] |= CUT * document.cut
            kept.append(document)

    columns = {name: np.array([entry.get(name, 0) for entry in entries], kind) for name, kind in COLUMNS.items()}
    columns["file"][:] = task.file
    marked = lay(kept, columns, tokenizer)
    sketched = np.zeros((0 if cfg.near_duplicates == "off" else len(entries), KEYS), np.uint64)
    if compared:
        sketched[list(compared)] = sketches(list(compared.values()))
    return Portion(columns, sketched, marked, list(categories), reasons)


def lay(documents: list[Document], columns: dict[str, np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """All documents end to end, marked (tokens,) uint32; and the columns that say where and what each of them is."""
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    ends = np.cumsum(lengths)
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(document.ids for document in documents), np.uint32, total)
    trained = np.frombuffer(b"".join(bytes(document.trained) for document in documents), np.bool_)
    marked = mark(ids, trained)

    starts = ends - lengths
    some = lengths > 0
    columns["start"], columns["tokens"] = starts, lengths.astype(COLUMNS["tokens"])
    columns["trained"] += sums(trained, starts, ends).astype(COLUMNS["trained"])
    columns["trained"][some] -= trained[starts[some]]  # nothing comes before a first token
    columns["flags"] |= np.where(sums(np.isin(marked, endings(tokenizer)), starts, ends) > 0, STOPS, 0).astype("<u1")
    data = marked.tobytes()
    columns["exact"] = np.array([hash_of(data[4 * a : 4 * b]) for a, b in zip(starts, ends, strict=True)], "<u8")

    # Rows that are equal once they are cut are to be on one side, so it is what is left of them that counts.
    alone = np.append(columns["part"][1:] == 0, True)[: len(lengths)] & (columns["part"] == 0)
    cut = alone & (columns["flags"] & CUT > 0)
    columns["content"][cut] = columns["exact"][cut]
    return marked


def sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of the values are true from each start to its end. (entries,) int64"""
    before = np.append(0, np.cumsum(values))
    return before[ends] - before[starts]


def flags_of(example: Example, tokenizer: Tokenizer) -> int:
    """Those that follow from the row alone."""
    hides, one = not shows_tools(example, tokenizer), only_answer(example) is not None
    return HIDES_TOOLS * hides | ONE_ANSWER * one | RAW * isinstance(example, Text)


def documents_of_rows(
    task: Task, cfg: DataConfig, tokenizer: Tokenizer, ended: Event
) -> Iterator[tuple[Place, Row | None, Example | None, list[Document] | RowError]]:
    """Each row of a chunk as its example and its documents, or as what is wrong with it."""
    rows = rows_of(task.chunk)
    while some := list(islice(rows, AT_ONCE)):
        if ended.is_set():
            raise Left
        read = [(place, row, example_of(row, task.format, cfg)) for place, row in some]
        examples = [example for _, _, example in read if not isinstance(example, RowError)]
        made = iter(documents_of(examples, cfg.template, tokenizer, cfg.train_on_prompt))
        for place, row, example in read:
            if isinstance(example, RowError):
                yield place, None, None, example
            else:
                yield place, row, example, next(made)


def example_of(row: Row | RowError, format: str, cfg: DataConfig) -> Example | RowError:
    try:
        return row if isinstance(row, RowError) else parse(row, format, cfg.columns)
    except RowError as error:
        return error


def overlong(whole: Document, cfg: DataConfig) -> Document:
    """What is kept of a document that is too long: its beginning, if something is learned there, or nothing."""
    cut = Document(whole.ids[: cfg.max_seq_len], whole.trained[: cfg.max_seq_len], cut=True)
    return cut if cfg.overlong == "truncate" and cut.learns else NOTHING


@lru_cache(maxsize=2)
def endings(tokenizer: Tokenizer) -> np.ndarray:
    """The ids, marked as to be learned, by which an answer ends: those that stop generation, and special tokens."""
    special = {id for id, token in tokenizer.engine.get_added_tokens_decoder().items() if token.special}
    special -= {tokenizer.bos_id}
    ids = sorted(tokenizer.stop_ids | special)
    return np.array(ids, np.uint32) | MARK


def content_hash(example: Example) -> int:
    """64 bits of what a row says, white space and the spelling of accents aside."""
    said = "\0".join(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts(example))
    return hash_of(said.encode())


def hash_of(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
