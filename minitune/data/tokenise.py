"""A chunk of a file -> its documents' tokens, and a table that says of each document what decides its fate.

This is the part that many processes do at once; nothing here imports torch.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from minitune.config import DataConfig
from minitune.data.chat_template import shows_tools
from minitune.data.corpus import MARK, mark
from minitune.data.duplicates import KEYS, said, sketches
from minitune.data.formats import PARSERS, Chat, Completion, Example, Instruction, Text, renamed
from minitune.data.looks import answer_key, look
from minitune.data.readers import Chunk, Place, Row, RowError, rows_of
from minitune.data.templates import Document, document, only_answer, texts
from minitune.tokenizer import Tokenizer

AT_ONCE = 512  # rows whose texts are encoded together
COLUMNS: dict[str, str] = {  # of the table: what is known of an entry, a document or a row that gives none
    "file": "<u2",  # which of the recipe's files
    "number": "<i8",  # of its line or row there
    "place": "<i8",  # its first byte there
    "size": "<i8",  # bytes
    "part": "<u1",  # 0: the first document of its row
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


def tokenise(task: Task, cfg: DataConfig, tokenizer: Tokenizer) -> Portion:
    """Read, check and tokenise the rows of a chunk."""
    table: dict[str, list[int]] = {name: [] for name in COLUMNS}
    stretches: list[np.ndarray] = [np.empty(0, np.uint32)]
    categories: dict[str, int] = {}
    reasons: list[tuple[str, str]] = []
    compared: dict[int, str] = {}  # entry -> the text that near duplicates are found by
    position = 0  # of the next token

    def enter(place: Place, **values: int) -> None:
        values |= {"file": task.file, "number": place.number, "place": place.start, "size": place.size}
        for name, column in table.items():
            column.append(values.get(name, 0))

    for place, row, example, made in documents_of_rows(task, cfg, tokenizer):
        if isinstance(made, RowError):
            reasons.append((made.key, str(made)))
            enter(place, flags=BAD, category=-1)
            continue
        category = categories.setdefault(category_of(row, example, cfg.category), len(categories))
        content, looks, answer = content_hash(example), look(example), answer_key(example)
        about = HIDES_TOOLS * (not shows_tools(example, tokenizer)) | ONE_ANSWER * (only_answer(example) is not None)
        about |= RAW * isinstance(example, Text)
        if cfg.near_duplicates != "off":
            compared[len(table["file"])] = said(example)
        for part, whole in enumerate(made):
            kept = whole if len(whole.ids) <= cfg.max_seq_len else overlong(whole, cfg)
            marked = mark(kept.ids, kept.trained)
            exact = hash_of(marked.tobytes())
            enter(
                place,
                part=part,
                exact=exact,
                content=exact if kept.cut and len(made) == 1 else content,
                start=position,
                tokens=len(marked),
                whole=len(whole.ids),
                trained=sum(kept.trained[1:]),
                flags=about | CUT * kept.cut | STOPS * bool(np.isin(marked, ends(tokenizer)).any()),
                category=category,
                looks=looks,
                answer=answer,
            )
            stretches.append(marked)
            position += len(marked)
    columns = {name: np.array(column, COLUMNS[name]) for name, column in table.items()}
    sketched = np.zeros((0 if cfg.near_duplicates == "off" else len(columns["file"]), KEYS), np.uint64)
    if compared:
        sketched[list(compared)] = sketches(list(compared.values()))
    return Portion(columns, sketched, np.concatenate(stretches), list(categories), reasons)


def documents_of_rows(
    task: Task, cfg: DataConfig, tokenizer: Tokenizer
) -> Iterator[tuple[Place, Row | None, Example | None, list[Document] | RowError]]:
    """Each row of a chunk as its example and its documents, or as what is wrong with it."""
    rows = rows_of(task.chunk)
    while some := list(islice(rows, AT_ONCE)):
        for place, row in some:
            try:
                if isinstance(row, RowError):
                    raise row
                example = PARSERS[task.format](renamed(row, cfg.columns))
                yield place, row, example, [document(example, cfg.template, tokenizer, cfg.train_on_prompt)]
            except RowError as error:
                yield place, None, None, error


def overlong(whole: Document, cfg: DataConfig) -> Document:
    """What is kept of a document that is too long: its beginning, if something is learned there, or nothing."""
    cut = Document(whole.ids[: cfg.max_seq_len], whole.trained[: cfg.max_seq_len], cut=True)
    return cut if cfg.overlong == "truncate" and cut.learns else Document([], [])


@lru_cache(maxsize=2)
def ends(tokenizer: Tokenizer) -> np.ndarray:
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


def category_of(row: Row, example: Example, column: str) -> str:
    """What a row is counted under: the value of a column of its own, else how it begins."""
    if column:
        value: Any = row.get(column)
        return str(value)[:60] if value is not None else "(none)"
    return " ".join(beginning(example)[:200].split()[:2]).lower()[:60]


def beginning(example: Example) -> str:
    match example:
        case Instruction(instruction=text) | Completion(prompt=text) | Text(text=text):
            return text
        case Chat(turns=turns):
            return next((turn.text for turn in turns if turn.role == "user"), "")
