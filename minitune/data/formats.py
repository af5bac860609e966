"""Rows -> examples: what a person wrote, checked, and not yet in any prompt.

A row is read by the columns it has. One that cannot be read whole is not lost, nor is a part of it left out: it becomes
a `BadRow` that says where it stands, at which key, and why.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.data.conversations import conversational, messages, sharegpt
from minitune.data.examples import Chat, Completion, Example, Instruction, Text, texts
from minitune.data.fields import filled, optional, text
from minitune.data.objects import Row, RowError, kind, shown
from minitune.data.readers import rows
from minitune.errors import UserError

TINY = Path(__file__).parents[1] / "tiny" / "train.jsonl"
NEEDED = {  # the columns of each format, from the most to the least particular
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}
MORE = {  # columns that a format reads where they are there
    "messages": {"system", "tools"},
    "sharegpt": {"system", "tools"},
    "alpaca": {"input", "system", "history"},
    "prompt_completion": set(),  # two lists of messages: those of messages
    "text": set(),
}
LISTED = 20  # names in a message
COLUMNS = sorted(set().union(*NEEDED.values(), *MORE.values()))
OTHERS = {format: frozenset(COLUMNS) - NEEDED[format] - MORE[format] for format in NEEDED}  # that it does not read


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands and what is wrong with it."""

    origin: str  # "train.jsonl:12", "train.json row 12"
    reason: str  # a sentence, with the key's path at its beginning
    key: str = ""  # "messages[2].content", by the file's own names; empty: the row as a whole

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"

    @classmethod
    def of(cls, origin: str, error: RowError) -> "BadRow":
        return cls(origin, str(error), error.key)


def locate(name: str) -> Path:
    """The file that data.train or data.eval names; "tiny" is the built-in set."""
    return TINY if name == "tiny" else Path(name)


def read(path: Path, format: str = "auto", columns: Mapping[str, str] | None = None) -> Iterator[Example | BadRow]:
    """The examples of a file, in its order, with a BadRow in the place of each row that cannot be read.

    Args:
        format: auto | alpaca | prompt_completion | messages | sharegpt | text; `auto` decides by the first row.
        columns: the file's name of a column -> ours, for those that differ.

    Raises:
        UserError: the file cannot be read at all, or its columns are not those asked for.
    """
    columns = columns or {}
    settled = ""
    for origin, row in rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            settled = settled or settle(path, row, format, columns)
            yield parse(row, settled, columns, origin)
        except RowError as error:
            yield BadRow.of(origin, error)


def settle(path: Path, row: Row, format: str = "auto", columns: Mapping[str, str] | None = None) -> str:
    """The format of a file, by the first of its rows that can be read.

    Raises:
        UserError: its columns fit no format, or are not those of the mapping.
    """
    check_columns(path, list(row), columns or {})
    return detect(path, renamed(row, columns or {})) if format == "auto" else format


def parse(row: Row, format: str, columns: Mapping[str, str] | None = None, origin: str = "") -> Example:
    """The example that one row is, by a format that `settle` gave.

    Raises:
        RowError: the row cannot be read, with the path of the key at fault by the file's own names.
    """
    try:
        ours = renamed(row, columns or {})
        example = PARSERS[format](ours, origin)
        refuse_names_of_others(ours, format, example)
        return example
    except RowError as error:
        raise RowError(error.reason, named_as_in_the_file(error.key, columns or {})) from None
    except RecursionError:  # JSON that could just be read, and is looked through from further down
        raise RowError("it is too deeply nested") from None


# ---- columns -------------------------------------------------------------------------------------------------------


def check_columns(path: Path, there: list[str], columns: Mapping[str, str]) -> None:
    """Refuse a mapping from columns that the file does not have, or to ones that no format has."""
    for theirs, ours in columns.items():
        if ours not in COLUMNS:
            raise UserError(f"data.columns.{theirs}: {ours!r} is no column of any format; they are {listed(COLUMNS)}")
    missing = [theirs for theirs in columns if theirs not in there]
    if missing:
        raise UserError(f"{path}: data.columns names {listed(missing)}, but its columns are {listed(there)}")


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row by our names; a renamed column takes the place of one that has the name already."""
    if not columns:
        return row
    kept = {name: value for name, value in row.items() if name not in columns}
    return kept | {ours: row[theirs] for theirs, ours in columns.items() if theirs in row}


def named_as_in_the_file(key: str, columns: Mapping[str, str]) -> str:
    """A key's path with its column by the name that it has in the file."""
    for theirs, ours in columns.items():
        if key == ours or key.startswith((f"{ours}.", f"{ours}[")):
            return theirs + key[len(ours) :]
    return key


def detect(path: Path, row: Row) -> str:
    """The first format, from the most to the least particular, whose columns the row has."""
    for format, needed in NEEDED.items():
        if row.keys() >= needed:
            return format
    formats = "; ".join(f"{format}: {' + '.join(sorted(needed))}" for format, needed in NEEDED.items())
    raise UserError(
        f"{path}: its columns ({listed(row)}) fit no format ({formats}); map them with data.columns, "
        'such as { question = "instruction", answer = "output" }'
    )


def listed(names: Iterable[object]) -> str:
    """Some names, as a message shows them."""
    names = list(names)
    more = [f"and {len(names) - LISTED:,} more"] * (len(names) > LISTED)
    return ", ".join([*(shown(str(name)) for name in names[:LISTED]), *more])


# ---- rows -> examples ----------------------------------------------------------------------------------------------


def alpaca(row: Row, origin: str) -> Instruction:
    instruction, input_, output = text(row, "instruction"), optional(row, "input"), filled(row, "output")
    return Instruction(instruction, input_, output, optional(row, "system"), history(row), origin)


def history(row: Row) -> tuple[tuple[str, str], ...]:
    """The earlier turns of an Alpaca row: a list of [what was asked, what was answered]."""
    pairs = row.get("history")
    if not pairs:
        return ()
    if not isinstance(pairs, list):
        raise RowError(f"is {kind(pairs)}, not a list", "history")
    read = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("is not a list of two texts, what was asked and what was answered", f"history[{number}]")
        asked, answered = f"history[{number}][0]", f"history[{number}][1]"
        sides = {asked: pair[0], answered: pair[1]}
        read.append((text(sides, asked), filled(sides, answered)))
    return tuple(read)


def prompt_completion(row: Row, origin: str) -> Completion | Chat:
    """Two texts, or two lists of messages."""
    if isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        return conversational(row, origin)
    return Completion(text(row, "prompt"), filled(row, "completion"), origin)


def raw_text(row: Row, origin: str) -> Text:
    return Text(filled(row, "text"), origin)


PARSERS: dict[str, Callable[[Row, str], Example]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": raw_text,
}


# ---- what a format does not read -----------------------------------------------------------------------------------

NO_PLACE = (
    "has no place in a row of this format, and is no copy of what is read; leave the column out, or write the row as "
    "messages"
)


def refuse_names_of_others(row: Row, format: str, example: Example) -> None:
    """What another format reads would be lost here, and nobody would know. Copies lose nothing: many sets carry an
    Alpaca row or a conversation once more as one rendered text, or its first question as a prompt."""
    for name in sorted(OTHERS[format] & row.keys()):
        if isinstance(example, Chat) and name in MORE["messages"]:
            continue
        value = row[name]
        empty = not (value.strip() if isinstance(value, str) else value)
        if not (empty or is_copy(value, example)):
            raise RowError(NO_PLACE, name)


def is_copy(value: Any, example: Example) -> bool:
    """Whether a text stands in one that is read, or has in it all that is read, or all but the answer; white space
    aside."""
    if not isinstance(value, str):
        return False
    value, *read = (" ".join(each.split()) for each in (value, *texts(example)))
    read = [each for each in read if each]
    return any(value in each for each in read) or all(each in value for each in read[:-1] or read)
