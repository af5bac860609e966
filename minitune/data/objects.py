"""Bytes -> one row: a JSON object, with each key once, or why there is none."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from minitune.data.looks import visible
from minitune.secrets import hidden

Row = dict[str, Any]
LONGEST_KEY, LONGEST_REASON = 120, 400  # characters that a message shows of each


class RowError(Exception):
    """This row cannot be used; the message says why, and `key` where in the row: "messages[2].content".

    Either may hold what the row itself says, so each is cut, and what a terminal would obey is written out.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        self.reason, self.key = shown(reason, LONGEST_REASON), shown(key, LONGEST_KEY)
        super().__init__(self.reason, self.key)

    def __str__(self) -> str:
        return f"{self.key} {self.reason}" if self.key else self.reason


def shown(text: str, most: int = LONGEST_KEY) -> str:
    """A text from a file as a message shows it: on one line, its middle left out where it is long."""
    if len(text) > most:
        text = hidden(text)  # half of a secret would not be known for one
    text = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - tail - 3]}...{text[-tail:]}"


def object_in(data: bytes) -> Row | RowError:
    """The JSON object in these bytes, or why there is none."""
    try:
        return an_object(parse_json(decoded(data)))
    except RowError as error:
        return error


class GivenTwice(Exception):
    """A key stands twice in an object."""


def unrepeated(pairs: list[tuple[str, Any]]) -> Row:
    """An object of these pairs, of which JSON would keep the last where a key stands twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise GivenTwice
    return row


class Pairs(list[tuple[str, Any]]):
    """An object by all that is written in it."""


def repeated_key(text: str) -> str:
    """The path of the first key in a JSON text that its object has had before."""
    whole = json.loads(text, object_pairs_hook=Pairs)
    under_way = [members(whole, "")]
    while under_way:  # no recursion: a row may be as deep as the parser goes
        here, again, value = next(under_way[-1], (None, False, None))
        if again:
            return here
        if here is None:
            under_way.pop()
        elif isinstance(value, list):
            under_way.append(members(value, here))
    raise ValueError("no key is given twice")


def members(value: Any, here: str) -> Iterator[tuple[str, bool, Any]]:
    """What an object or a list holds: the path of each, whether its key has been before, and the value."""
    seen: set[str] = set()
    if isinstance(value, Pairs):
        for name, inner in value:
            yield f"{here}.{name}" if here else name, name in seen, inner
            seen.add(name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield f"{here}[{number}]", False, inner


TWICE = "is given twice in one object"
JSON = json.JSONDecoder(object_pairs_hook=unrepeated)  # one for all rows: making it takes as long as reading one


def parse_json(text: str) -> Any:
    try:
        with suppress(GivenTwice):
            return JSON.decode(text)
        twice = repeated_key(text)  # reads on to the text's end, which may be broken behind the key
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise RowError(f"not valid JSON at {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise RowError(f"not readable JSON: {error}") from None
    raise RowError(TWICE, twice)


def decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RowError(f"not valid UTF-8 at byte {error.start + 1}") from None


def an_object(value: Any) -> Row | RowError:
    return value if isinstance(value, dict) else RowError(f"{kind(value)}, not an object")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {str: "text", bool: "a truth value", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")
