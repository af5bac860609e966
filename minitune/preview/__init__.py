"""What a recipe's data is, for a person to look at before anything is trained.

`preview` gathers it from the store's tables, so that the size of the files does not matter; of the rows themselves only
those that are shown are read. terminal.py and page.py write it down.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitune.config import DataConfig
from minitune.data import Prepared
from minitune.data.corpus import Corpus
from minitune.data.duplicates import said, similarity
from minitune.data.fates import Fate
from minitune.data.formats import PARSERS, Example, renamed
from minitune.data.looks import WORDS, evidence, visible
from minitune.data.packing import fill, rows
from minitune.data.readers import RowError
from minitune.data.store import Store
from minitune.tokenizer import Tokenizer

ROWS = 5  # shown as the model meets them
HEAD, TAIL = 400, 100  # tokens that are shown of a longer document
EXAMPLES = 3  # of everything else
CATEGORIES = 12
REPEATED = 3  # rows that give the same answer, from which on it is worth a look
LITTLE = 0.05  # share of trained tokens, below which a document is worth a look
LONG = 8  # times the median


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


def preview(data: Prepared, cfg: DataConfig, tokenizer: Tokenizer) -> Preview:
    """Gather what is to be shown of prepared data."""
    store, fates = data.store, data.fates
    used = np.isin(fates.fate, (Fate.TRAIN, Fate.EVAL))
    near = (fates.twin >= 0) & (used | (fates.fate == Fate.NEAR_DUPLICATE))
    across = near & used
    across[across] = fates.fate[fates.twin[across]] != fates.fate[across]
    packed = packed_counts(data.train, cfg)
    examples = Examples(store, cfg)
    return Preview(
        files=[*cfg.train, *cfg.eval],
        max_seq_len=cfg.max_seq_len,
        packing=cfg.packing,
        counts=data.counts | packed,
        warnings=data.warnings,
        rows=[shown(store, entry, tokenizer) for entry in first_entries(store, data.train_entries)],
        left_out=list(left_out(data)),
        lengths=lengths(store, cfg.max_seq_len),
        documents_per_row=len(data.train) / max(1, packed["packed_rows"]),
        duplicates=twins(examples, data, fates.fate == Fate.DUPLICATE),
        near_duplicates=twins(examples, data, near),
        near_overlap=int(np.count_nonzero(across)),
        overlap=twins(examples, data, fates.fate == Fate.OVERLAP),
        categories=categories(store, used),
        looks=[*looks(examples, store, used), *shapes(examples, store, used)],
    )


def packed_counts(train: Corpus, cfg: DataConfig) -> dict[str, int | float]:
    """The rows of an epoch, whose number no seed changes, and how full they are."""
    number = len(rows(train.lengths, cfg.max_seq_len, 0, cfg.packing))
    return {"packed_rows": number, "fill": round(fill(train.lengths, max(1, number), cfg.max_seq_len), 4)}


def glance(data: Prepared, tokenizer: Tokenizer) -> Iterator[str]:
    """The first row as it is trained on, in one line."""
    for entry in data.train_entries[:1].tolist():
        ids, trained = data.store.tokens(entry)
        first = int(np.argmax(trained))
        before = tokenizer.decode(ids[max(0, first - 20) : first].tolist(), skip_special=False)
        learned = tokenizer.decode(ids[trained].tolist(), skip_special=False)
        yield (
            f"{visible(data.store.origin(entry))}, as the model meets it: after {quoted(before, last=True)} it learns "
            f"{quoted(learned)} ({np.count_nonzero(trained)} of {len(ids)} tokens)"
        )


def quoted(text: str, most: int = 60, last: bool = False) -> str:
    """A text on one line, its end or its beginning where it is long."""
    if len(text) > most:
        text = "..." + text[-most:] if last else text[:most] + "..."
    return '"' + visible(text).replace("\n", "\\n").replace("\t", "\\t") + '"'


# ---- documents as the model meets them -----------------------------------------------------------------------------


def first_entries(store: Store, entries: np.ndarray) -> list[int]:
    """The first document of each file, and those that follow the first."""
    file = store.column("file")[entries]
    _, first = np.unique(file, return_index=True)
    chosen = dict.fromkeys(entries[[*first, *range(len(entries[:ROWS]))]].tolist())
    return sorted([*chosen][:ROWS])


def shown(store: Store, entry: int, tokenizer: Tokenizer) -> Shown:
    ids, trained = store.tokens(entry)
    learned = tokenizer.decode(ids[trained].tolist(), skip_special=False)
    return Shown(
        store.origin(entry),
        len(ids),
        int(np.count_nonzero(trained[1:])),
        list(stretches(ids, trained, tokenizer)),
        learned,
    )


def stretches(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> Iterator[Stretch]:
    """The text of a document in stretches; put together, and without what is left out, its text whole.

    A stretch's text is what the decoded text grows by, as tokens decoded by themselves lose spaces at their seams. A
    character whose bytes lie on both sides of a seam stands in the later stretch.
    """
    total = len(ids)
    hidden = range(HEAD, total - TAIL) if total > HEAD + TAIL else range(0)
    ends = {*(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), total}
    ends = {end for end in ends if end not in hidden} | ({hidden.start, hidden.stop} if hidden else set())
    start, before = 0, 0  # of the stretch: in tokens, and in characters
    for end in sorted(ends):
        text = tokenizer.decode(ids[:end].tolist(), skip_special=False)
        after = len(text) if end == total else len(text.rstrip("\ufffd"))
        if hidden and end == hidden.stop:
            yield Stretch("", False, left_out=end - start)
        else:
            yield Stretch(text[before:after], bool(trained[start]))
        start, before = end, after


# ---- from the tables -----------------------------------------------------------------------------------------------


class Examples:
    """Rows read again from their files, for the few that are shown."""

    def __init__(self, store: Store, cfg: DataConfig) -> None:
        self.store, self.columns = store, cfg.columns

    def __getitem__(self, entry: int) -> Example | None:
        """The example of an entry; None where its file has just been changed."""
        row = self.store.row(entry)
        if isinstance(row, RowError):
            return None
        try:
            return PARSERS[self.store.sources[self.store.value("file", entry)].format](renamed(row, self.columns))
        except RowError:
            return None

    def text(self, entry: int) -> str:
        example = self[entry]
        return "" if example is None else said(example)


LEFT_OUT = {
    Fate.BAD: "cannot be used",
    Fate.DROPPED: "too long",
    Fate.DUPLICATE: "the same as another",
    Fate.NEAR_DUPLICATE: "nearly the same as another",
    Fate.OVERLAP: "held out in data.eval, too",
}


def left_out(data: Prepared) -> Iterator[Found]:
    """Each fate but to be used, with the first rows that met it."""
    counts = {fate: data.fates.count(fate) for fate in LEFT_OUT}
    some: dict[Fate, list[tuple[str, str]]] = {fate: [] for fate in LEFT_OUT}
    for entry, row in zip(np.flatnonzero(data.fates.fate > Fate.EVAL).tolist(), data.left_out(), strict=True):
        met = some[Fate(data.fates.fate[entry])]
        if len(met) < EXAMPLES:
            met.append((data.store.origin(entry), row["reason"]))
        if all(len(some[fate]) == min(EXAMPLES, counts[fate]) for fate in LEFT_OUT):
            break
    return (Found(words, counts[fate], some[fate]) for fate, words in LEFT_OUT.items() if counts[fate])


def lengths(store: Store, limit: int) -> Lengths | None:
    whole = store.column("whole")
    whole = whole[whole > 0]
    if not len(whole):
        return None
    low = int(np.floor(2 * np.log2(whole.min() / limit)))
    high = max(0, int(np.ceil(2 * np.log2(whole.max() / limit))))
    edges = np.unique([int(limit * 2 ** (half / 2)) + 1 for half in range(min(low, -1), high + 1)])
    documents, _ = np.histogram(whole, [*edges[:-1], edges[-1] - 0.5])
    over = int(np.count_nonzero(whole > limit))
    return Lengths(edges.tolist(), documents.tolist(), limit, int(np.median(whole)), int(whole.max()), over)


def twins(examples: Examples, data: Prepared, which: np.ndarray) -> list[Twins]:
    """The first rows of those marked beside what they repeat."""
    found = []
    for entry in np.flatnonzero(which & (data.fates.twin >= 0))[:EXAMPLES].tolist():
        twin = int(data.fates.twin[entry])
        one, other = examples.text(entry), examples.text(twin)
        origins = data.store.origin(entry), data.store.origin(twin)
        found.append(Twins(origins[0], one, origins[1], other, similarity(one, other)))
    return found


def categories(store: Store, used: np.ndarray) -> list[Category]:
    """The largest categories of documents that are used, and the rest as one."""
    category, tokens = store.column("category")[used], store.column("tokens")[used]
    documents = np.bincount(category, minlength=len(store.categories))
    weight = np.bincount(category, tokens, minlength=len(store.categories)).astype(np.int64)
    order = np.argsort(-documents, kind="stable")
    listed = [
        Category(store.categories[n], int(documents[n]), int(weight[n])) for n in order[:CATEGORIES] if documents[n]
    ]
    rest = order[CATEGORIES:]
    if documents[rest].sum():
        name = f"{np.count_nonzero(documents[rest]):,} others"
        listed.append(Category(name, int(documents[rest].sum()), int(weight[rest].sum()), rest=True))
    return listed


def looks(examples: Examples, store: Store, used: np.ndarray) -> Iterator[Found]:
    """Rows worth a look for what stands in them."""
    bits = store.column("looks") * (used & (store.column("part") == 0))
    for flag, words in WORDS.items():
        seen = np.flatnonzero(bits & flag)
        if len(seen):
            some = [(entry, examples[entry]) for entry in seen[:EXAMPLES].tolist()]
            rows = [(store.origin(entry), evidence(example, flag) if example else "") for entry, example in some]
            yield Found(words, len(seen), rows)


def shapes(examples: Examples, store: Store, used: np.ndarray) -> Iterator[Found]:
    """Rows worth a look beside the others: an answer that many give, a great length, a small share of trained tokens."""
    first = np.flatnonzero(used & (store.column("part") == 0))
    if not len(first):
        return
    _, places, times = np.unique(store.column("answer")[first], return_index=True, return_counts=True)
    for place in np.argsort(-times, kind="stable")[:EXAMPLES]:
        if times[place] >= REPEATED:
            entry = int(first[places[place]])
            example = examples[entry]
            text = evidence(example, 0) if example else ""
            yield Found("the same answer as in other rows", int(times[place]), [(store.origin(entry), text)])

    entries = np.flatnonzero(used)
    tokens, whole, trained = (store.column(name)[entries] for name in ("tokens", "whole", "trained"))
    long = entries[whole > LONG * np.median(whole)]
    little = entries[trained < LITTLE * tokens]
    for words, some in (
        (f"over {LONG} times as long as most documents", long),
        (f"under {LITTLE:.0%} of the document is trained", little),
    ):
        if len(some):
            rows = [
                (
                    store.origin(entry),
                    f"{store.value('trained', entry):,} of {store.value('whole', entry):,} tokens trained",
                )
                for entry in some[:EXAMPLES].tolist()
            ]
            yield Found(words, len(some), rows)
