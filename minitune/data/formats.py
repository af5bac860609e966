"""Rows -> examples: what a person wrote, checked, and not yet in any prompt.

A row is read by the columns it has, as one of four kinds of example. A row that cannot be read is not lost: it becomes
a `BadRow` that says where it stands and why.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minitune.data.readers import Row, RowError, kind, parse_json, rows
from minitune.errors import UserError

TINY = Path(__file__).parents[1] / "tiny" / "train.jsonl"
NEEDED = {  # the columns of each format, from the most to the least particular
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}
COLUMNS = sorted({"input", "system", "tools"}.union(*NEEDED.values()))
ROLE_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
NOT_READ = ("tool_calls", "function_call", "reasoning_content", "weight")  # leaving these out would change a message


@dataclass(frozen=True)
class Instruction:
    """A row in Alpaca's format."""

    instruction: str
    input: str  # empty: none
    output: str
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, both as they stand."""

    prompt: str
    completion: str
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Turn:
    role: str  # system | user | assistant | tool
    text: str
    train: bool  # is it to be learned


@dataclass(frozen=True)
class Chat:
    """A conversation: at most one system turn, first; then user and assistant in turn, tools between them."""

    turns: tuple[Turn, ...]
    tools: str = ""  # a JSON list, as text
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Text:
    """Raw text, all of it to be learned."""

    text: str
    origin: str = field(default="", compare=False)


Example = Instruction | Completion | Chat | Text


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands and what is wrong with it."""

    origin: str  # "train.jsonl:12", "train.json row 12"
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


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
    parse = None
    for origin, row in rows(path):
        if isinstance(row, RowError):
            yield BadRow(origin, str(row))
            continue
        if parse is None:
            check_columns(path, list(row), columns)
        row = renamed(row, columns)
        if parse is None:
            parse = PARSERS[detect(path, row) if format == "auto" else format]
        try:
            yield replace(parse(row), origin=origin)
        except RowError as error:
            yield BadRow(origin, str(error))


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
    kept = {name: value for name, value in row.items() if name not in columns}
    return kept | {ours: row[theirs] for theirs, ours in columns.items() if theirs in row}


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


# ---- rows -> examples ----------------------------------------------------------------------------------------------


def alpaca(row: Row) -> Instruction:
    input_ = "" if row.get("input") is None else text(row, "input")
    return Instruction(text(row, "instruction"), input_, filled(row, "output"))


def prompt_completion(row: Row) -> Completion:
    return Completion(text(row, "prompt"), filled(row, "completion"))


def raw_text(row: Row) -> Text:
    return Text(filled(row, "text"))


def messages(row: Row) -> Chat:
    turns = []
    for place, message in turns_of(row, "messages"):
        role = text(message, "role", place)
        if role not in ROLE_MAY_FOLLOW:
            raise RowError(f"{place}role is {role!r}; the roles are {listed(ROLE_MAY_FOLLOW)}")
        for key in NOT_READ:
            if message.get(key) is not None:
                raise RowError(f"{place}{key} is not supported; write what it says into the content")
        turns.append(Turn(role, content(message, place), to_be_learned(message, role, place)))
    return chat(turns, row)


def sharegpt(row: Row) -> Chat:
    turns = []
    for place, message in turns_of(row, "conversations"):
        speaker = text(message, "from", place)
        if speaker not in SHAREGPT_ROLES:
            raise RowError(f"{place}from is {speaker!r}; the speakers are {listed(SHAREGPT_ROLES)}")
        role = SHAREGPT_ROLES[speaker]
        turns.append(Turn(role, text(message, "value", place), role == "assistant"))
    if row.get("system"):
        turns.insert(0, Turn("system", text(row, "system"), False))
    return chat(turns, row)


PARSERS: dict[str, Callable[[Row], Example]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": raw_text,
}


def chat(turns: list[Turn], row: Row) -> Chat:
    """A conversation whose turns come in an order that can be learned from."""
    before = None
    for turn in turns:
        if before not in ROLE_MAY_FOLLOW[turn.role]:
            follows = f"follows {before}" if before else "comes first"
            raise RowError(f"roles in the wrong order: {turn.role} {follows}")
        if turn.role == "assistant" and not turn.text.strip():
            raise RowError("an assistant's turn is empty")
        before = turn.role
    if before != "assistant":
        raise RowError(f"the conversation ends with {before}, not with an answer of the assistant")
    return Chat(tuple(turns), tools_of(row))


def turns_of(row: Row, column: str) -> Iterator[tuple[str, Row]]:
    """Each message of a conversation, with the beginning of what to say about it."""
    conversation = value_of(row, column)
    if not isinstance(conversation, list):
        raise RowError(f"{column} is {kind(conversation)}, not a list")
    if not conversation:
        raise RowError(f"{column} is empty")
    for number, message in enumerate(conversation):
        if not isinstance(message, dict):
            raise RowError(f"{column}[{number}] is {kind(message)}, not an object")
        yield f"{column}[{number}].", message


def content(message: Row, place: str) -> str:
    """The text of a message, which may come in parts."""
    parts = value_of(message, "content", place)
    if not isinstance(parts, list):
        return text(message, "content", place)
    texts = []
    for number, part in enumerate(parts):
        here = f"{place}content[{number}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError(f"{here} is not a part of type 'text'")
        texts.append(text(part, "text" if "text" in part else "value", f"{here}."))
    return "".join(texts)


def to_be_learned(message: Row, role: str, place: str) -> bool:
    marks = [message[key] for key in ("train", "loss_weight") if message.get(key) is not None]
    if any(mark not in (0, 1) for mark in marks) or len(set(marks)) > 1:
        raise RowError(f"{place}train is true or false, or loss_weight 1 or 0, and both say the same")
    if marks and marks[0] and role != "assistant":
        raise RowError(f"{place}only an assistant's turn can be trained on its own; see data.train_on_prompt")
    return bool(marks[0]) if marks else role == "assistant"


def tools_of(row: Row) -> str:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except RowError as error:
            raise RowError(f"tools: {error}") from None
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is not a list of objects")
    return text({"tools": json.dumps(tools, ensure_ascii=False)}, "tools")


def filled(row: Row, column: str) -> str:
    """A text that is to be learned, so there must be some."""
    value = text(row, column)
    if not value.strip():
        raise RowError(f"{column} is empty")
    return value


def text(row: Row, column: str, place: str = "") -> str:
    value = value_of(row, column, place)
    if not isinstance(value, str):
        raise RowError(f"{place}{column} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{place}{column} holds half a surrogate pair, which is no character") from None
    return value


def value_of(row: Row, column: str, place: str = "") -> Any:
    if column not in row:
        raise RowError(f"{place}{column} is missing; there is {listed(row) or 'nothing'}")
    if row[column] is None:
        raise RowError(f"{place}{column} is null")
    return row[column]


def listed(names: Any) -> str:
    return ", ".join(map(str, names))
