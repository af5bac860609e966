"""The values of a row, each checked where it is taken, and each refusal with the path of its key."""

from collections.abc import Iterator
from typing import Any

from minitune.data.objects import Row, RowError, kind


def text(row: Row, name: str, place: str = "") -> str:
    """A text without what no tokenizer can take.

    Args:
        place: the path of the object that holds it, "messages[2]".
    """
    value = value_of(row, name, place)
    if not isinstance(value, str):
        raise RowError(f"is {kind(value)}, not text", path(place, name))
    check_characters(value, path(place, name))
    return value


def filled(row: Row, name: str, place: str = "") -> str:
    """A text that is to be learned, so there must be some."""
    value = text(row, name, place)
    if not value.strip():
        raise RowError("is empty", path(place, name))
    return value


def optional(row: Row, name: str, place: str = "") -> str:
    """A text that may be null or not there: then it is empty."""
    return "" if row.get(name) is None else text(row, name, place)


def items(row: Row, name: str, place: str = "") -> Iterator[tuple[str, Row]]:
    """The objects in a list that must hold some, each with its path."""
    here, value = path(place, name), value_of(row, name, place)
    if not isinstance(value, list):
        raise RowError(f"is {kind(value)}, not a list", here)
    if not value:
        raise RowError("is empty", here)
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise RowError(f"is {kind(item)}, not an object", f"{here}[{number}]")
        yield f"{here}[{number}]", item


def refuse_others(row: Row, place: str, known: frozenset[str], why: str) -> None:
    """Refuse the first key that says something and is not among those known: leaving it out would change the row."""
    for name, value in row.items():
        if name not in known and value not in (None, "", [], {}):
            raise RowError(why, path(place, name))


def value_of(row: Row, name: str, place: str = "") -> Any:
    if name not in row:
        raise RowError(f"is missing; there is {', '.join(map(str, row)) or 'nothing'}", path(place, name))
    if row[name] is None:
        raise RowError("is null", path(place, name))
    return row[name]


def check_characters(value: str, here: str) -> None:
    if "\0" in value:
        raise RowError(f"holds a NUL character, its character {value.index(chr(0)) + 1}", here)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"holds half a surrogate pair, which is no character, as its character {error.start + 1}", here
            ) from None


def check_all_characters(value: Any, here: str) -> None:
    """Check every text in a JSON value, names of keys included, and that it is one."""
    if isinstance(value, str):
        check_characters(value, here)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_all_characters(item, f"{here}[{number}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            check_characters(name, here)
            check_all_characters(item, path(here, name))
    elif not (value is None or isinstance(value, int | float)):  # a date in a parquet file, say
        raise RowError(f"is a {type(value).__name__}, which JSON cannot write", here)


def path(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
