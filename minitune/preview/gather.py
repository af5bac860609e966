"""Prepared data -> all that is shown of it."""

from collections.abc import Iterator

import numpy as np

from minitune.config import DataConfig
from minitune.data import Prepared
from minitune.data.corpus import Corpus
from minitune.data.duplicates import said, similarity
from minitune.data.examples import Example
from minitune.data.fates import Fate
from minitune.data.formats import parse
from minitune.data.looks import WORDS, evidence
from minitune.data.objects import RowError
from minitune.data.packing import fill, rows
from minitune.data.store import Store
from minitune.preview import Category, Found, Lengths, Preview, Twins
from minitune.preview.documents import first_entries, shown
from minitune.tokenizer import Tokenizer

EXAMPLES = 3  # of everything
CATEGORIES = 12
REPEATED = 3  # rows that give the same answer, from which on it is worth a look
LITTLE = 0.05  # share of trained tokens, below which a document is worth a look
LONG = 8  # times the median


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
        duplicates=twins(examples, pairs(data, fates.fate == Fate.DUPLICATE)),
        near_duplicates=twins(examples, pairs(data, near)),
        near_overlap=int(np.count_nonzero(across)),
        overlap=twins(examples, overlapping(data)),
        categories=categories(store, used),
        looks=[*looks(examples, store, used), *shapes(examples, store, used)],
    )


def packed_counts(train: Corpus, cfg: DataConfig) -> dict[str, int | float]:
    """The rows of an epoch, whose number no seed changes, and how full they are."""
    number = len(rows(train.lengths, cfg.max_seq_len, 0, cfg.packing))
    return {"packed_rows": number, "fill": round(fill(train.lengths, max(1, number), cfg.max_seq_len), 4)}


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
            return parse(row, self.store.sources[self.store.value("file", entry)].format, self.columns)
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

    def edge(halves: int) -> int:
        """The first length that is over max_seq_len times the root of two to this power."""
        return int(limit * 2 ** (halves / 2)) + 1

    low, high = -1, 0
    while edge(low) > whole.min():
        low -= 1
    while edge(high) <= whole.max():
        high += 1
    edges = np.unique([edge(halves) for halves in range(low, high + 1)])
    documents, _ = np.histogram(whole, [*edges[:-1], edges[-1] - 0.5])
    over = int(np.count_nonzero(whole > limit))
    return Lengths(edges.tolist(), documents.tolist(), limit, int(np.median(whole)), int(whole.max()), over)


def pairs(data: Prepared, which: np.ndarray) -> list[tuple[int, int]]:
    """The first entries of those marked, each with the one that it repeats."""
    return [(entry, int(data.fates.twin[entry])) for entry in np.flatnonzero(which)[:EXAMPLES].tolist()]


def overlapping(data: Prepared) -> list[tuple[int, int]]:
    """The first entries that say what one of data.eval says, each with that one."""
    content, fate = data.store.column("content"), data.fates.fate
    held, others = np.flatnonzero(fate == Fate.EVAL), np.flatnonzero((fate == Fate.TRAIN) | (fate == Fate.OVERLAP))
    found = others[np.isin(content[others], content[held])][:EXAMPLES]
    return [(entry, int(held[np.argmax(content[held] == content[entry])])) for entry in found.tolist()]


def twins(examples: Examples, pairs: list[tuple[int, int]]) -> list[Twins]:
    found = []
    for entry, twin in pairs:
        one, other = examples.text(entry), examples.text(twin)
        origins = examples.store.origin(entry), examples.store.origin(twin)
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
    """Rows worth a look beside the others: an answer that many give, great length, few trained tokens."""
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
