"""What a recipe's data is, for a person to look at before anything is trained.

gather.py makes a `Preview` from the store's tables, so that the size of the files does not matter; of the rows
themselves only those that are shown are read. terminal.py and page.py write it down.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that are all trained, or all not."""

    text: str
    trained: bool
    left_out: int = 0  # tokens that are not shown here, instead of a text


@dataclass(frozen=True)
class Shown:
    """A document as the model meets it."""

    origin: str
    tokens: int
    trained: int  # loss tokens
    stretches: list[Stretch]
    learned: str  # the trained tokens, decoded


@dataclass(frozen=True)
class Found:
    """Rows that have something in common."""

    words: str
    count: int
    rows: list[tuple[str, str]]  # some of them: where each stands, and what is to be seen


@dataclass(frozen=True)
class Twins:
    """A row that repeats another, or nearly."""

    origin: str
    text: str
    twin_origin: str
    twin_text: str
    similarity: float  # Jaccard, of shingles


@dataclass(frozen=True)
class Lengths:
    """Documents by their tokens, those too long included, before any cut."""

    edges: list[int]  # bin i holds lengths from edges[i] to edges[i + 1] - 1; max_seq_len + 1 is one of the edges
    documents: list[int]
    limit: int  # max_seq_len
    median: int
    longest: int
    over: int  # documents longer than the limit


@dataclass(frozen=True)
class Category:
    name: str
    documents: int
    tokens: int
    rest: bool = False  # all that are smaller, together


@dataclass(frozen=True)
class Preview:
    """All that is shown of a recipe's data."""

    files: list[str]
    max_seq_len: int
    packing: bool
    counts: dict[str, int | float]  # those of run.json
    warnings: list[str]
    rows: list[Shown]
    left_out: list[Found]
    lengths: Lengths | None  # None: there are no documents
    documents_per_row: float
    duplicates: list[Twins]
    near_duplicates: list[Twins]
    near_overlap: int  # near duplicates of which one is trained on and one held out
    overlap: list[Twins]
    categories: list[Category]
    looks: list[Found]
