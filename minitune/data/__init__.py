"""From the files a recipe names to two corpora: one to learn from, one held out.

    files -> readers.py -> rows -> formats.py -> examples -> templates.py -> documents -> packing.py -> rows of tokens

`prepare` is the whole way up to the documents; stream.py goes on from there.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from minitune.config import DataConfig
from minitune.data.chat_template import shows_tools
from minitune.data.formats import BadRow, Example, RowError, locate, read
from minitune.data.packing import Corpus
from minitune.data.templates import Document, documents, only_answer, prompt_ids, texts
from minitune.errors import UserError
from minitune.files import sha256
from minitune.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, as the model is to be given it, and the answer that is right."""

    prompt_ids: list[int]
    prompt_text: str
    answer: str


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    train: Corpus
    eval: Corpus | None  # None: nothing is held out
    counts: dict[str, int | float]  # rows = skipped + duplicates + dropped + train_documents + eval_documents
    digests: dict[str, str]  # file, as the recipe names it -> sha256
    samples: list[Sample]
    skipped: list[str]  # each row that was skipped, and why
    warnings: list[str]


def prepare(cfg: DataConfig, tokenizer: Tokenizer, samples: int = 0) -> Prepared:
    """Read, check, tokenise and split the data of a recipe.

    Nothing here is random: what is held out follows from the rows themselves.

    Args:
        samples: how many held-out prompts to give along, of the rows that have exactly one answer.

    Raises:
        UserError: a file, a row or the whole cannot be used; the message says which and what to change.
    """
    digests = digests_of([*cfg.train, *cfg.eval])
    train, held = gather(cfg.train, cfg, tokenizer), gather(cfg.eval, cfg, tokenizer)
    refuse_rows(cfg, train.bad + held.bad, train.overlong + held.overlong)
    refuse_loss(cfg, train, held)

    train_items, eval_items = (train.items, held.items) if cfg.eval else hold_out(train.items, cfg.eval_fraction)
    trained_on = {side(item) for item in train_items}
    overlap = sum(side(item) in trained_on for item in eval_items)
    train_corpus, eval_corpus = corpus(train_items), corpus(eval_items) if eval_items else None
    counts: dict[str, int | float] = {
        "rows": train.rows + held.rows,
        "skipped": len(train.bad) + len(held.bad),
        "duplicates": train.duplicates + held.duplicates,
        "overlap": overlap,
        "dropped": train.dropped + held.dropped,
        "truncated": train.truncated + held.truncated,
        "train_documents": len(train_items),
        "eval_documents": len(eval_items),
        "tokens": len(train_corpus.tokens),
        "trained_tokens": train_corpus.trained_tokens,
    }
    return Prepared(
        train_corpus,
        eval_corpus,
        counts,
        digests,
        list(islice(samples_of(eval_items, cfg.template, tokenizer), samples)),
        [str(row) for row in train.bad + held.bad],
        list(warnings(cfg, counts, train_items + eval_items, tokenizer)),
    )


# ---- files -> documents --------------------------------------------------------------------------------------------

Item = tuple[Example, Document]


@dataclass
class Gathered:
    """What became of the rows of some files."""

    items: list[Item] = field(default_factory=list)
    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    overlong: list[BadRow] = field(default_factory=list)  # with overlong = "error"
    duplicates: int = 0
    dropped: int = 0
    truncated: int = 0


def gather(names: Iterable[str], cfg: DataConfig, tokenizer: Tokenizer) -> Gathered:
    """Every row of the files as an example and its document, or in one of the counts."""
    got = Gathered()
    seen: set[Example] = set()
    seen_cut: set[tuple[int, ...]] = set()  # rows that are equal once they are cut
    for row in chain.from_iterable(read(locate(name), cfg.format, cfg.columns) for name in names):
        got.rows += 1
        if isinstance(row, BadRow):
            got.bad.append(row)
            continue
        if cfg.deduplicate and row in seen:
            got.duplicates += 1
            continue
        seen.add(row)
        try:
            wholes = documents(row, cfg.template, tokenizer, cfg.train_on_prompt)
        except RowError as error:
            got.bad.append(BadRow.of(row.origin, error))
            continue
        for whole in wholes:
            if len(whole.ids) <= cfg.max_seq_len:
                got.items.append((row, whole))
                continue
            cut = Document(whole.ids[: cfg.max_seq_len], whole.trained[: cfg.max_seq_len], cut=True)
            if cfg.overlong == "error":
                got.overlong.append(BadRow(row.origin, f"{len(whole.ids)} tokens"))
            elif cfg.overlong == "truncate" and cfg.deduplicate and tuple(cut.ids) in seen_cut:
                got.duplicates += 1
            elif cfg.overlong == "truncate" and cut.learns:
                seen_cut.add(tuple(cut.ids))
                got.truncated += 1
                got.items.append((row, cut))
            else:
                got.dropped += 1
    return got


def corpus(items: list[Item]) -> Corpus:
    return Corpus.from_documents((document.ids, document.trained) for _, document in items)


def digests_of(names: list[str]) -> dict[str, str]:
    """The sha256 of each file, all that are not there named at once."""
    if remote := [name for name in names if "://" in name]:
        raise UserError(
            f"data.train and data.eval: {', '.join(remote)} is not on this disk; download it and name the file"
        )
    missing = [name for name in names if not locate(name).is_file()]
    if missing:
        raise UserError(f"data.train and data.eval name files that are not there: {', '.join(missing)}")
    return {name: sha256(locate(name)) for name in names}


# ---- what is held out ----------------------------------------------------------------------------------------------


def hold_out(items: list[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Split into (train, eval) by a hash of each row's content.

    So a row stays on its side whatever is added or taken away around it, and equal rows are on the same side. Where
    there are two different rows or more, neither side is empty.
    """
    hashes = [side(item) for item in items]
    different = sorted(set(hashes))
    if fraction == 0 or len(different) < 2:
        return items, []
    held = {value for value in different if value < fraction} or {different[0]}
    if len(held) == len(different):
        held.remove(different[-1])
    pairs = list(zip(items, hashes, strict=True))
    return [item for item, value in pairs if value not in held], [item for item, value in pairs if value in held]


def side(item: Item) -> float:
    """The number in [0, 1) that decides where a row goes: of its content, or of what is left of it if it was cut."""
    example, document = item
    if document.cut:
        return int.from_bytes(hashlib.sha256(repr(document.ids).encode()).digest()[:6]) / 2**48
    return content_hash(example)


def content_hash(example: Example) -> float:
    """A number in [0, 1) from what a row says, white space and the spelling of accents aside."""
    content = "\0".join(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts(example))
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6]) / 2**48


def samples_of(items: list[Item], template: str, tokenizer: Tokenizer) -> Iterator[Sample]:
    for example, _ in items:
        answer = only_answer(example)
        ids = [] if answer is None else prompt_ids(example, template, tokenizer)
        if answer is not None and ids:
            yield Sample(ids, tokenizer.decode(ids), answer)


# ---- what is said about it -----------------------------------------------------------------------------------------

SHOWN = 10  # of the rows that a message is about


def refuse_rows(cfg: DataConfig, bad: list[BadRow], overlong: list[BadRow]) -> None:
    """One error for all rows that the recipe does not let pass."""
    parts = []
    if bad and cfg.bad_rows == "error":
        parts.append(
            f'{len(bad)} rows cannot be used; mend them, or leave them out with data.bad_rows = "skip"\n{some(bad)}'
        )
    if overlong:
        parts.append(
            f"{len(overlong)} rows are longer than data.max_seq_len = {cfg.max_seq_len}; raise it, or "
            f'set data.overlong to "drop" or "truncate"\n{some(overlong)}'
        )
    if parts:
        raise UserError("\n".join(parts))


def refuse_loss(cfg: DataConfig, train: Gathered, held: Gathered) -> None:
    """Nothing left, or most rows dropped for their length, is a mistake in the recipe."""
    mend = f"raise data.max_seq_len = {cfg.max_seq_len}" + (
        ' or set data.overlong = "truncate"' * (cfg.overlong == "drop")
    )
    for key, names, got in (("train", cfg.train, train), ("eval", cfg.eval, held)):
        if names and not got.rows:
            raise UserError(f"data.{key}: {', '.join(names)} holds no rows")
        if names and not got.items:
            raise UserError(
                f"data.{key}: nothing is left of {got.rows} rows: {len(got.bad)} skipped, {got.dropped} too long; "
                + (mend if got.dropped else f"look at what was skipped\n{some(got.bad)}")
            )
    dropped, kept = train.dropped + held.dropped, len(train.items) + len(held.items)
    if dropped > kept:
        raise UserError(f"{dropped} of {dropped + kept} rows are too long and would be dropped; {mend}")


def warnings(cfg: DataConfig, counts: dict[str, int | float], items: list[Item], tokenizer: Tokenizer) -> Iterator[str]:
    documents = counts["train_documents"] + counts["eval_documents"]
    if counts["skipped"]:
        yield f"{counts['skipped']} of {counts['rows']} rows cannot be used and are skipped"
    if counts["dropped"] > 0.05 * (documents + counts["dropped"]):
        yield (
            f"{counts['dropped']} of {documents + counts['dropped']} rows are longer than data.max_seq_len = "
            f"{cfg.max_seq_len} and are dropped; raise it, or see data.overlong"
        )
    if counts["overlap"]:
        yield f"{counts['overlap']} of {counts['eval_documents']} rows of data.eval are in data.train as well"
    if not cfg.eval and cfg.eval_fraction > 0 and not counts["eval_documents"]:
        yield "no rows are held out, as all are the same"
    if not all(shows_tools(example, tokenizer) for example, _ in items):
        yield "some rows list tools, which the tokenizer's chat template does not show to the model"


def some(rows: list[BadRow]) -> str:
    """The first few rows, one a line, and how many there are besides."""
    shown = [f"  {row}" for row in rows[:SHOWN]]
    return "\n".join(shown + ([f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []))
