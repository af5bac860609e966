"""Reading files that nobody vouches for: of a model, an adapter, a run folder that came from elsewhere.

A file is opened without waiting for it (a FIFO would never answer) and read only if it is a regular one of a size that
its kind can have. JSON is parsed so that neither depth nor numbers nor the count of its values can do harm, and so
that it says one thing: a key that stands twice is refused, since two programs may read two values.
"""

import json
import math
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from minitune.errors import UserError
from minitune.secrets import shortened

MOST = 16_000_000  # bytes of a JSON file; those of models are of a few kB, an index of 10,000 tensors of 1 MB
DEPTH = 64  # of objects and lists in one another
VALUES = 3_000_000  # of one JSON file; a tokenizer with half a million merges has half of that
DIGITS = 400  # of a number


def opened(path: Path) -> BinaryIO:
    """A regular file, open to read; a link may lead to it. Raises UserError for all that is none."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder where a file is needed") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is no regular file (a device or a pipe, perhaps), and is not read")
    return file


def inside(folder: Path, name: object) -> Path:
    """The file `name` of `folder`. Raises UserError, before opening anything, if it would lie elsewhere."""
    plain = isinstance(name, str) and name and not {"/", "\\", "\0"} & set(name) and PurePosixPath(name).name == name
    if not plain or name in (".", ".."):
        raise UserError(
            f"{folder}: {shortened(repr(name), 100)} is no plain file name, and a file may not lie outside the folder"
        )
    path = folder / name
    try:
        target, home = path.resolve(), folder.resolve()
        found, regular = target.exists(), target.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long, one that is no text, links in a circle
        raise UserError(f"{folder}: {shortened(name, 100)!r} cannot be the name of a file") from None
    roots = [home]
    if home.parent.name == "snapshots":  # the Hub's cache links its snapshots to blobs beside them
        roots.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link that leaves the folder; a file may not lie outside it")
    if not regular:
        raise UserError(f"{path} is no file (a folder, a device or a pipe)" if found else f"{path} is missing")
    return path


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """A regular file of at most `most` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path} has {size:,} bytes; a file of its kind has at most {most:,}")
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise UserError(f"{path} has more than {most:,} bytes, the most that a file of its kind has")
    return data


def read_text(path: Path, most: int = MOST) -> str:
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


def read_json(path: Path, most: int = MOST) -> dict[str, Any]:
    """A JSON object from a file of at most `most` bytes."""
    value = parse_json(read_bytes(path, most), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def parse_json(data: bytes, where: str) -> Any:
    """A JSON value; what `where` names is blamed for what is wrong with it."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > VALUES:
        raise UserError(f"{where} holds more than {VALUES:,} values, which no such file needs")
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=without_doubles,
            parse_int=whole_number,
            parse_float=number,
            parse_constant=no_number,
        )
    except RecursionError:
        raise UserError(f"{where} is no JSON that is read here: it is nested more than {DEPTH} levels deep") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise UserError(f"{where} is no JSON: {error}") from None
    level = [value]
    for _ in range(DEPTH):
        holders = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [inner for holder in holders for inner in holder if isinstance(inner, dict | list)]
    if level:
        raise UserError(f"{where} is no JSON that is read here: it is nested more than {DEPTH} levels deep")
    return value


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {shortened(next(key for key in keys if keys.count(key) > 1), 100)!r} stands twice in an object"
        )
    return values


def whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def number(text: str) -> float:
    if len(text) > DIGITS or not math.isfinite(value := float(text)):
        raise ValueError(f"{shortened(text, 50)} is no number that can be computed with")
    return value


def no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")
