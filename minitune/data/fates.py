"""What becomes of each document: trained on, held out, or left out and why. Decided from the store's table alone."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from minitune.config import DataConfig
from minitune.data.duplicates import groups
from minitune.data.store import Store
from minitune.data.tokenise import BAD


class Fate(IntEnum):
    TRAIN = 0
    EVAL = 1
    BAD = 2  # it cannot be used
    DROPPED = 3  # too long
    DUPLICATE = 4  # of an earlier one
    OVERLAP = 5  # it is in data.eval, too
    NEAR_DUPLICATE = 6


@dataclass(frozen=True)
class Fates:
    """The fate of every entry of a store."""

    fate: np.ndarray  # (entries,) uint8 of Fate
    twin: np.ndarray  # (entries,) int64: the entry that it repeats; -1: none
    overlap: int  # documents of data.train that are in data.eval, left out or not
    near_duplicates: int  # documents of data.train that nearly repeat another, left out or not

    def entries(self, fate: Fate) -> np.ndarray:
        return np.flatnonzero(self.fate == fate)

    def count(self, fate: Fate) -> int:
        return int(np.count_nonzero(self.fate == fate))


def decide(store: Store, cfg: DataConfig) -> Fates:
    """Files of data.eval are the last of the store's."""
    flags, tokens, exact, content = (store.column(name) for name in ("flags", "tokens", "exact", "content"))
    given = store.column("file") >= len(cfg.train)  # of data.eval
    fate = np.where(given, Fate.EVAL, Fate.TRAIN).astype(np.uint8)
    twin = np.full(len(store), -1, np.int64)
    fate[tokens == 0] = Fate.DROPPED
    fate[flags & BAD > 0] = Fate.BAD

    if cfg.deduplicate:
        for side in (Fate.TRAIN, Fate.EVAL):
            alive = np.flatnonzero(fate == side)
            first = alive[firsts(exact[alive])]
            repeats = first != alive
            fate[alive[repeats]], twin[alive[repeats]] = Fate.DUPLICATE, first[repeats]
    overlap = overlapping(fate, exact, content)
    if cfg.deduplicate:
        fate[overlap] = Fate.OVERLAP

    near = nearly(store, cfg, fate, twin) if cfg.near_duplicates != "off" else np.empty(0, np.int64)
    if cfg.near_duplicates == "remove":
        fate[near] = Fate.NEAR_DUPLICATE

    if not cfg.eval:
        alive = np.flatnonzero(fate == Fate.TRAIN)
        fate[alive[held_out(content[alive], cfg.eval_fraction)]] = Fate.EVAL
    return Fates(fate, twin, len(overlap), len(near))


def firsts(keys: np.ndarray) -> np.ndarray:
    """For each key the place of the first one that is equal. (n,) -> (n,) int64"""
    if len(keys) == 0:
        return np.empty(0, np.int64)
    order = np.argsort(keys, kind="stable")
    begins = np.append(True, keys[order][1:] != keys[order][:-1])
    result = np.empty(len(keys), np.int64)
    result[order] = order[begins][np.cumsum(begins) - 1]
    return result


def overlapping(fate: np.ndarray, exact: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The entries of data.train that say the same, or are the same tokens, as one of data.eval."""
    train, held = np.flatnonzero(fate == Fate.TRAIN), np.flatnonzero(fate == Fate.EVAL)
    if len(held) == 0:
        return held
    return train[np.isin(content[train], content[held]) | np.isin(exact[train], exact[held])]


def nearly(store: Store, cfg: DataConfig, fate: np.ndarray, twin: np.ndarray) -> np.ndarray:
    """The entries of data.train whose rows nearly repeat one of data.eval or an earlier one; `twin` is told which."""
    begins = store.column("part") == 0
    rows = [np.flatnonzero(begins & (fate == side)) for side in (Fate.EVAL, Fate.TRAIN)]  # those of data.eval stay
    entries = np.concatenate(rows)
    group = groups(store.sketches(entries))
    near = np.flatnonzero(group[len(rows[0]) :] != np.arange(len(rows[0]), len(entries))) + len(rows[0])
    twin[entries[near]] = entries[group[near]]
    row = np.maximum.accumulate(np.where(begins, np.arange(len(fate)), 0))  # each entry's first of the row
    repeats = np.zeros(len(fate), np.bool_)
    repeats[entries[near]] = True
    return np.flatnonzero(repeats[row] & (fate == Fate.TRAIN))


def held_out(content: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, (n,) bool, by the hash of what their rows say.

    So a row stays on its side whatever is added or taken away around it, and equal rows are on the same side. Where
    there are two different rows or more, neither side is empty.
    """
    different = np.unique(content)
    if fraction == 0 or len(different) < 2:
        return np.zeros(len(content), np.bool_)
    limit = min(max(int(fraction * 2**64), int(different[0]) + 1), int(different[-1]))
    return content < np.uint64(limit)


def repeated(entries: np.ndarray, content: np.ndarray, weight: float) -> np.ndarray:
    """The entries of a file so many times: each floor(weight) or ceil(weight) times, round(weight x n) in all.

    Those that come once more are the same in every epoch, and are chosen by their hash, not by their place.
    """
    whole = int(weight)
    more = round(weight * len(entries)) - whole * len(entries)
    return np.sort(np.concatenate([np.repeat(entries, whole), entries[np.argsort(content, kind="stable")[:more]]]))
