"""From the files a recipe names to two corpora: one to learn from, one held out.

    files -> readers.py -> rows -> formats.py -> examples -> templates.py -> documents    (tokenise.py, workers.py)
          -> store.py -> tables -> fates.py -> corpus.py -> packing.py -> rows of tokens -> stream.py

`prepare` is the whole way up to the corpora; stream.py goes on from there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minitune import files
from minitune.config import DataConfig
from minitune.data.checks import refuse_doubtful, refuse_rows, warnings
from minitune.data.corpus import Corpus
from minitune.data.examples import only_answer
from minitune.data.fates import Fate, Fates, decide, repeated
from minitune.data.formats import parse, settle
from minitune.data.objects import RowError
from minitune.data.readers import chunks, reader_of, rows_of
from minitune.data.sources import digests_of, find
from minitune.data.store import Source, Store, open_store
from minitune.data.templates import prompt_ids
from minitune.data.tokenise import CUT, ONE_ANSWER
from minitune.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, as the model is to be given it, and the answer that is right."""

    prompt_ids: list[int]
    prompt_text: str
    answer: str


@dataclass(frozen=True, eq=False)
class Prepared:
    """The data of a run."""

    train: Corpus
    eval: Corpus | None  # None: nothing is held out
    train_entries: np.ndarray  # (documents,) int64: where each document of `train` is in the store's table
    eval_entries: np.ndarray
    counts: dict[str, int | float]
    digests: dict[str, str]  # file, as the recipe names it -> sha256
    samples: list[Sample]
    warnings: list[str]
    fates: Fates
    store: Store

    def left_out(self) -> Iterator[dict[str, Any]]:
        """Each row that is not used, in the order of the files: where it stands, its fate, and why."""
        return left_out(self.store, self.fates)

    def write_left_out(self, path: Path) -> None:
        """All of `left_out`, an object a line."""
        files.write_lines(path, self.left_out())


def prepare(cfg: DataConfig, tokenizer: Tokenizer, samples: int = 0, refuse: bool = True) -> Prepared:
    """Read, check, tokenise and split the data of a recipe.

    Nothing here is random: what is held out follows from the rows themselves.

    Args:
        samples: how many held-out prompts to give along, of the rows that have exactly one answer.
        refuse: whether rows that cannot be used, and data that can hardly be meant, are errors; for a preview they
            are not.

    Raises:
        UserError: a file, a row or the whole cannot be used; the message says which and what to change.
    """
    found = find([*cfg.train, *cfg.eval])
    digests = digests_of(found)
    listed = [Source(name, found[name], digests[name], settled(found[name], cfg)) for name in (*cfg.train, *cfg.eval)]
    store = open_store(listed, cfg, tokenizer)
    if refuse:
        refuse_rows(store, cfg)
    fates = decide(store, cfg)
    train_entries, eval_entries = weighted(store, fates, cfg), fates.entries(Fate.EVAL)
    train = corpus_of(store, train_entries)
    held = corpus_of(store, eval_entries) if len(eval_entries) else None
    counts = counted(store, fates, train, eval_entries)
    if refuse:
        refuse_doubtful(store, fates, cfg, counts)
    return Prepared(
        train=train,
        eval=held,
        train_entries=train_entries,
        eval_entries=eval_entries,
        counts=counts,
        digests=digests,
        samples=list(islice(samples_of(store, eval_entries, cfg, tokenizer), samples)),
        warnings=list(warnings(store, fates, cfg, counts)),
        fates=fates,
        store=store,
    )


def settled(path: Path, cfg: DataConfig) -> str:
    """The format of a file's rows: as the recipe says, or by its first row."""
    for chunk in chunks(path, size=64 << 10):
        for _, row in rows_of(chunk):
            if not isinstance(row, RowError):
                return settle(path, row, cfg.format, cfg.columns)
    return "text" if cfg.format == "auto" else cfg.format  # there is none that can be read


def weighted(store: Store, fates: Fates, cfg: DataConfig) -> np.ndarray:
    """The entries that an epoch takes, as often as data.weights says."""
    entries = fates.entries(Fate.TRAIN)
    if not cfg.weights:
        return entries
    file, content = store.column("file")[entries], store.column("content")[entries]
    parts = [repeated(entries[file == n], content[file == n], weight) for n, weight in enumerate(cfg.weights)]
    return np.concatenate(parts)


def corpus_of(store: Store, entries: np.ndarray) -> Corpus:
    columns = (store.column(name)[entries] for name in ("start", "tokens", "trained"))
    start, tokens, trained = columns
    return Corpus(store.marked, start, tokens, int(trained.sum(dtype=np.int64)), store.marked_digest)


def counted(store: Store, fates: Fates, train: Corpus, eval_entries: np.ndarray) -> dict[str, int | float]:
    """The numbers of run.json. rows = skipped + duplicates + dropped + left out for overlap or as near duplicates +
    train_documents + eval_documents, where each row is one document and has no weight."""
    used = np.isin(fates.fate, (Fate.TRAIN, Fate.EVAL))
    return {
        "rows": int(np.count_nonzero(store.column("part") == 0)),
        "skipped": fates.count(Fate.BAD),
        "duplicates": fates.count(Fate.DUPLICATE),
        "near_duplicates": fates.near_duplicates,
        "overlap": fates.overlap,
        "dropped": fates.count(Fate.DROPPED),
        "truncated": int(np.count_nonzero(used & (store.column("flags") & CUT > 0))),
        "train_documents": len(train),
        "eval_documents": len(eval_entries),
        "tokens": train.tokens,
        "trained_tokens": train.trained_tokens,
    }


def samples_of(store: Store, entries: np.ndarray, cfg: DataConfig, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Held-out prompts, of the rows that have exactly one answer."""
    asks = store.column("flags")[entries] & ONE_ANSWER > 0
    for entry in entries[asks].tolist():
        row = store.row(entry)
        if isinstance(row, RowError):  # the file has just been changed
            continue
        format = store.sources[store.value("file", entry)].format
        example = parse(row, format, cfg.columns)
        if ids := prompt_ids(example, cfg.template, tokenizer):
            yield Sample(ids, tokenizer.decode(ids), only_answer(example))


WHY = {
    Fate.DROPPED: ("data.max_seq_len", "{whole} tokens, too long"),
    Fate.DUPLICATE: ("data.deduplicate", "the same as {twin}"),
    Fate.OVERLAP: ("data.deduplicate", "in data.eval, too: {twin}"),
    Fate.NEAR_DUPLICATE: ("data.near_duplicates", "nearly the same as {twin}"),
}


def left_out(store: Store, fates: Fates) -> Iterator[dict[str, Any]]:
    reasons = store.reasons()
    file, number, whole = (store.column(name) for name in ("file", "number", "whole"))
    for entry in np.flatnonzero(fates.fate > Fate.EVAL):
        fate, source = Fate(fates.fate[entry]), store.sources[file[entry]]
        where = {"file": source.name, reader_of(source.path).unit: int(number[entry])}
        if fate == Fate.BAD:
            _, key, reason = next(reasons)
        else:
            twin = fates.twin[entry]
            key, words = WHY[fate]
            stands = store.origin(twin) if twin >= 0 else ""
            reason = words.format(whole=whole[entry], twin=stands)
        yield where | {"fate": fate.name.lower(), "key": key, "reason": reason}
