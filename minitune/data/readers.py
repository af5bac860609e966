"""Files -> rows: JSON objects as they stand in a file, whatever their columns mean.

`.json` is a list of objects, `.jsonl` one object a line, `.txt` raw text: rows with the one column "text". Another
kind of file is one more reader here.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitune.errors import UserError

Row = dict[str, Any]


class RowError(Exception):
    """This row cannot be used; the message says why, and `key` where in the row: "messages[2].content"."""

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason, key)
        self.reason, self.key = reason, key

    def __str__(self) -> str:
        return f"{self.key} {self.reason}" if self.key else self.reason


def rows(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    """Each row of a file with its origin, or what keeps it from being read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: rows are read from {', '.join(READERS)} files, by the suffix")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def json_rows(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    try:
        content = parse_json(decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8)))
    except RowError as error:
        raise UserError(f"{path}: {error}; a file with one object a line is named .jsonl") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: holds {kind(content)}, not a list of objects")
    for number, row in enumerate(content, 1):
        yield f"{path} row {number}", an_object(row)


def jsonl_rows(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = an_object(parse_json(decoded(line)))
        except RowError as error:
            row = error
        yield f"{path}:{number}", row


def text_rows(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    """Documents lie between blank lines; a file without any holds one document a line."""
    one_a_line = not has_blank_lines_inside(path)
    start, document = 0, []
    for number, line in lines(path):
        if line.strip():
            start = start or number
            document.append(line)
        if document and (one_a_line or not line.strip()):
            yield f"{path}:{start}", text_row(document)
            start, document = 0, []
    if document:
        yield f"{path}:{start}", text_row(document)


READERS = {".json": json_rows, ".jsonl": jsonl_rows, ".txt": text_rows}


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends. Only \\n ends a line: a JSON string may hold U+2028 and its like."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def has_blank_lines_inside(path: Path) -> bool:
    blank = begun = False
    for _, line in lines(path):
        if line.strip() and blank:
            return True
        begun = begun or bool(line.strip())
        blank = begun and not line.strip()
    return False


def text_row(document: list[bytes]) -> Row | RowError:
    try:
        return {"text": decoded(b"\n".join(document))}
    except RowError as error:
        return error


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise RowError(f"not valid JSON at {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise RowError(f"not readable JSON: {error}") from None


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
