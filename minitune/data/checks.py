"""What is said, before a model loads, about data that cannot be used or can hardly be meant."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from minitune.config import DataConfig
from minitune.data.categories import NONE
from minitune.data.fates import Fate, Fates
from minitune.data.objects import TWICE, shown
from minitune.data.store import Store
from minitune.data.tokenise import BAD, CUT, HIDES_TOOLS, RAW, STOPS
from minitune.errors import UserError
from minitune.secrets import shortened

SHOWN = 10  # of the rows that a message is about
KINDS = 1000  # of reasons that are counted apart, as a file could give each row one of its own
OTHERS = ""
VARYING = re.compile(r"\d+|['\";].*", re.DOTALL)
OWN_NAMES = re.compile(r"\b(arguments|tools)[.\[].*", re.DOTALL)  # below these a row has names of its own
TOO_MANY = 0.05  # of the rows left out
ANYWAY = 'if it is meant so, set data.checks = "warn"'
Counts = dict[str, int | float]


def refuse_rows(store: Store, cfg: DataConfig) -> None:
    """One error for all rows that the recipe does not let pass."""
    flags, file = store.column("flags"), store.column("file")
    for key, names, mine in (("train", cfg.train, file < len(cfg.train)), ("eval", cfg.eval, file >= len(cfg.train))):
        if names and not mine.any():
            raise UserError(f"data.{key}: {', '.join(names)} holds no rows")
    parts = []
    bad = int(np.count_nonzero(flags & BAD))
    if bad and cfg.bad_rows == "error":
        parts.append(
            f'{bad} rows cannot be used; mend them, or leave them out with data.bad_rows = "skip"\n'
            f"{some_of_each_kind(store, store.reasons())}"
        )
    overlong = np.flatnonzero((store.column("tokens") == 0) & (flags & BAD == 0))
    if len(overlong) and cfg.overlong == "error":
        listed = (f"{store.origin(entry)}: {store.value('whole', entry)} tokens" for entry in overlong)
        parts.append(
            f"{len(overlong)} rows are longer than data.max_seq_len = {cfg.max_seq_len}; raise it, or "
            f'set data.overlong to "drop" or "truncate"\n{some(listed, len(overlong))}'
        )
    if parts:
        raise UserError("\n".join(parts))


def refuse_doubtful(store: Store, fates: Fates, cfg: DataConfig, counts: Counts) -> None:
    """Nothing left to train or evaluate on is an error; what can hardly be meant is one, unless it is let pass."""
    refuse_emptiness(store, fates, cfg)
    if cfg.checks == "error" and (found := list(doubts(store, fates, cfg, counts))):
        raise UserError("\n".join(found) + f"\n{ANYWAY}")


def refuse_emptiness(store: Store, fates: Fates, cfg: DataConfig) -> None:
    given = store.column("file") >= len(cfg.train)
    for key, names, mine, used in (("train", cfg.train, ~given, Fate.TRAIN), ("eval", cfg.eval, given, Fate.EVAL)):
        if not names or (fates.fate[mine] == used).any():
            continue
        became = {fate: int(np.count_nonzero(fates.fate[mine] == fate)) for fate in Fate}
        shares = {
            "skipped": became[Fate.BAD],
            "too long": became[Fate.DROPPED],
            "in data.eval, too": became[Fate.OVERLAP],
        }
        reasons = (bad for bad in store.reasons() if mine[bad[0]])
        raise UserError(
            f"data.{key}: nothing is left of {np.count_nonzero(mine)} rows: "
            f"{', '.join(f'{count} {what}' for what, count in shares.items() if count)}; "
            + (longer(cfg) if became[Fate.DROPPED] else "look at what was left out")
            + (f"\n{some_of_each_kind(store, reasons)}" if became[Fate.BAD] else "")
        )


def doubts(store: Store, fates: Fates, cfg: DataConfig, counts: Counts) -> Iterator[str]:
    """What can hardly be meant, a sentence each."""
    used = np.isin(fates.fate, (Fate.TRAIN, Fate.EVAL))
    flags, trained = store.column("flags")[used], store.column("trained")[used].sum(dtype=np.int64)
    made = f"the {np.count_nonzero(used)} documents"
    if trained == 0:
        yield f"data: nothing is learned from {made}: no token of them is trained"
    answers = flags & RAW == 0
    predicted = (store.column("tokens")[used] - 1)[answers].sum(dtype=np.int64)
    if answers.any() and not cfg.train_on_prompt and trained_among(store, used, answers) >= predicted:
        yield f"data: every token of {made} is trained, as if nothing were a prompt; see data.columns and data.format"
    whole = flags & CUT == 0
    if whole.any() and not (flags[whole] & STOPS).any():
        yield "data: no document trains the token that ends an answer, so the model would never learn to stop"
    left_out = counts["skipped"] + counts["dropped"]
    if left_out > TOO_MANY * len(fates.fate):
        shares = [f"{counts['skipped']} cannot be used"] * (counts["skipped"] > 0)
        shares += [f"{counts['dropped']} are too long ({longer(cfg)})"] * (counts["dropped"] > 0)
        yield (
            f"data: {left_out} of {len(fates.fate)} rows are left out, more than {TOO_MANY:.0%}: {' and '.join(shares)}"
        )


def trained_among(store: Store, used: np.ndarray, these: np.ndarray) -> int:
    return int(store.column("trained")[used][these].sum(dtype=np.int64))


def warnings(store: Store, fates: Fates, cfg: DataConfig, counts: Counts) -> Iterator[str]:
    if len(store) == 0:
        yield "data: the files hold no rows"
        return
    doubted = list(doubts(store, fates, cfg, counts))
    yield from doubted
    if counts["skipped"] and not any("left out" in doubt for doubt in doubted):
        yield f"{counts['skipped']} of {counts['rows']} rows cannot be used and are skipped"
    if counts["overlap"]:
        what = "not trained on" if cfg.deduplicate else "trained on all the same"
        yield f"{counts['overlap']} rows of data.train are in data.eval as well and are {what}"
    if cfg.category and store.categories == [NONE]:
        yield f"data.category: no row has anything in a column {shown(cfg.category)}"
    if not cfg.eval and cfg.eval_fraction > 0 and counts["train_documents"] and not counts["eval_documents"]:
        yield "no rows are held out, as all are the same"
    if (store.column("flags")[np.isin(fates.fate, (Fate.TRAIN, Fate.EVAL))] & HIDES_TOOLS).any():
        yield "some rows list tools, which the tokenizer's chat template does not show to the model"


def longer(cfg: DataConfig) -> str:
    also = ' or set data.overlong = "truncate"' * (cfg.overlong == "drop")
    return f"raise data.max_seq_len = {cfg.max_seq_len}{also}"


def some(rows: Iterator[str], count: int) -> str:
    """The first few rows, one a line, and how many there are besides."""
    shown = [f"  {row}" for row in islice(rows, SHOWN)]
    return "\n".join(shown + ([f"  and {count - SHOWN} more"] if count > SHOWN else []))


@dataclass
class Kind:
    """Rows that cannot be used for the same reason, their numbers aside."""

    first: tuple[int, str]  # entry and sentence
    count: int = 0


def some_of_each_kind(store: Store, reasons: Iterator[tuple[int, str, str]]) -> str:
    """Rows that cannot be used, one a line: the first of each kind with the number of its like, and where there are
    few kinds the first of all; then how many there are besides."""
    kinds: dict[str, Kind] = {}
    early: list[tuple[int, str]] = []  # the first of all
    count = 0
    for count, (entry, key, reason) in enumerate(reasons, 1):
        if count <= SHOWN:
            early.append((entry, reason))
        kind = kind_of(reason, key)
        if kind not in kinds and len(kinds) == KINDS:
            kind = OTHERS
        kinds.setdefault(kind, Kind((entry, reason))).count += 1

    firsts = {kind.first: kind.count for kind in islice(kinds.values(), SHOWN)}
    more = [row for row in early if row not in firsts][: SHOWN - len(firsts)]
    lines = []
    for entry, reason in sorted([*firsts, *more]):
        alike = firsts.get((entry, reason), 1) if len(kinds) > 1 else 1
        lines.append(f"  {store.origin(entry)}: {reason}" + (f" ({alike:,} such rows)" if alike > 1 else ""))
    if count > len(lines):
        unseen = len(kinds) - len(firsts)
        of_kinds = f", {'at least ' * (OTHERS in kinds)}{unseen} other reasons among them" if unseen else ""
        lines.append(f"  and {count - len(lines):,} more{of_kinds}")
    return "\n".join(lines)


def kind_of(reason: str, key: str = "") -> str:
    """A reason without what differs from row to row: numbers, names of the row's own, and what comes after a quote or
    a semicolon. A key given twice is one kind, whatever the key."""
    if TWICE in reason:
        return TWICE
    place = OWN_NAMES.sub(r"\1", key)
    return VARYING.sub("", shortened(f"{place}{reason.removeprefix(key)}", 200))
