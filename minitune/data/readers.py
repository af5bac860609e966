"""Files -> rows: JSON objects as they stand in a file, whatever their columns mean.

`.json` is a list of objects, `.jsonl` one object a line, `.txt` raw text: rows with the one column "text". `.parquet`
needs the extra of that name. Another kind of file is one more `Reader` here.

A file is read in chunks that know nothing of each other, so that many processes can read it and none ever holds more
than a chunk: some megabytes, or the longest row (in parquet: an eighth of a row group) if that is more.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minitune.data.objects import Row, RowError, decoded, object_in, shown
from minitune.errors import UserError

CHUNK = 4 << 20  # bytes


@dataclass(frozen=True)
class Chunk:
    """A stretch of a file that can be read by itself."""

    path: str
    start: int  # bytes; in parquet rows
    stop: int
    first: int  # the number of its first line, or row
    blank_between: bool = False  # text whose documents lie between blank lines


class Place(NamedTuple):
    """Where a row stands in its file."""

    number: int  # of its line, or row; the first is 1
    start: int  # byte; in parquet the rows before it
    size: int  # bytes; in parquet 1


@dataclass(frozen=True)
class Reader:
    """A kind of file."""

    unit: str  # what its numbers count
    chunks: Callable[[Path, int], Iterator[Chunk]]
    rows: Callable[[Chunk], Iterator[tuple[Place, Row | RowError]]]


def rows(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    """Each row of a file with its origin, or what keeps it from being read."""
    for chunk in chunks(path):
        for place, row in rows_of(chunk):
            yield origin(path, place.number), row


def chunks(path: Path, size: int = CHUNK) -> Iterator[Chunk]:
    """Cut a file into stretches of about `size` bytes, between rows."""
    with speaking(path):
        yield from reader_of(path).chunks(path, size)


def rows_of(chunk: Chunk) -> Iterator[tuple[Place, Row | RowError]]:
    """The rows of a chunk, each with its place."""
    with speaking(chunk.path):
        yield from reader_of(Path(chunk.path)).rows(chunk)


def row_at(path: Path, place: Place) -> Row | RowError:
    """One row again."""
    _, row = next(rows_of(Chunk(str(path), place.start, place.start + place.size, place.number, True)))
    return row


def origin(path: Path, number: int, name: str = "") -> str:
    """Where a row stands, as people are told: "train.jsonl:12", "train.json row 12", by the recipe's name if given."""
    return f"{name or path}:{number}" if reader_of(path).unit == "line" else f"{name or path} row {number}"


def reader_of(path: Path) -> Reader:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: rows are read from {', '.join(READERS)} files, by the suffix")
    return reader


@contextmanager
def speaking(path: Path | str) -> Iterator[None]:
    """Within the block, a file that cannot be opened or read is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


# ---- .jsonl --------------------------------------------------------------------------------------------------------


def line_chunks(path: Path, size: int) -> Iterator[Chunk]:
    with open(path, "rb") as file:
        start, number = after_bom(file), 1
        while block := file.read(size):
            block += file.readline()
            yield Chunk(str(path), start, start + len(block), number)
            start, number = start + len(block), number + block.count(b"\n")


def jsonl_rows(chunk: Chunk) -> Iterator[tuple[Place, Row | RowError]]:
    for place, line in lines(chunk):
        if line.strip():
            yield place, object_in(line)


def lines(chunk: Chunk) -> Iterator[tuple[Place, bytes]]:
    """Lines without their ends. Only \\n ends a line: a JSON string may hold U+2028 and its like."""
    start = chunk.start
    for number, line in enumerate(content(chunk).split(b"\n"), chunk.first):
        yield Place(number, start, len(line)), line.removesuffix(b"\r")
        start += len(line) + 1


# ---- .txt ----------------------------------------------------------------------------------------------------------


def text_chunks(path: Path, size: int) -> Iterator[Chunk]:
    """Documents lie between blank lines; a file without any holds one document a line."""
    if not has_blank_lines_inside(path):
        yield from line_chunks(path, size)
        return
    with open(path, "rb") as file:
        start, number = after_bom(file), 1
        while block := file.read(size):
            parts = [block, file.readline()]  # to the end of its last line
            while (line := file.readline()).strip():  # and on to a blank one
                parts.append(line)
            block = b"".join([*parts, line])
            yield Chunk(str(path), start, start + len(block), number, blank_between=True)
            start, number = start + len(block), number + block.count(b"\n")


def text_rows(chunk: Chunk) -> Iterator[tuple[Place, Row | RowError]]:
    document: list[tuple[Place, bytes]] = []
    for place, line in lines(chunk):
        if line.strip():
            document.append((place, line))
        if document and not (line.strip() and chunk.blank_between):
            yield text_row(document)
            document = []
    if document:
        yield text_row(document)


def text_row(document: list[tuple[Place, bytes]]) -> tuple[Place, Row | RowError]:
    (number, start, _), (_, last, size) = document[0][0], document[-1][0]
    place = Place(number, start, last + size - start)
    try:
        return place, {"text": decoded(b"\n".join(line for _, line in document))}
    except RowError as error:
        return place, error


def has_blank_lines_inside(path: Path) -> bool:
    blank = begun = False
    with open(path, "rb") as file:
        after_bom(file)
        for line in file:
            if line.strip() and blank:
                return True
            begun = begun or bool(line.strip())
            blank = begun and not line.strip()
    return False


# ---- .json ---------------------------------------------------------------------------------------------------------

OUTSIDE = re.compile(rb'[^"\[\]{},]*')  # up to what matters outside a string
INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # up to a string's end, as far as it is there
WHITE = b" \t\r\n"
LINES_ARE_ELSEWHERE = "a file with one object a line is named .jsonl"


def list_chunks(path: Path, size: int) -> Iterator[Chunk]:
    """Whole elements of the file's one list, about `size` bytes of them to a chunk."""
    with open(path, "rb") as file:
        start = after_bom(file)
        while (head := file.read(1)) and head in WHITE:
            start += 1
        if head != b"[":
            what = {b"{": "an object", b'"': "a text", b"": "nothing"}.get(head, "something else")
            raise UserError(f"{path}: holds {what}, not a list of objects; {LINES_ARE_ELSEWHERE}")
        begin, number, count = start + 1, 1, 0
        for separator in separators(blocks_of(file), begin):
            count += 1
            if separator.last:
                if separator.at - begin > 0:
                    yield Chunk(str(path), begin, separator.at, number)
                file.seek(separator.at + 1)
                check_nothing_follows(path, file)
                return
            if separator.at - begin >= size:
                yield Chunk(str(path), begin, separator.at, number)
                begin, number = separator.at + 1, count + 1
        raise UserError(f"{path}: its list is not closed; it ends in row {count + 1}")


def json_rows(chunk: Chunk) -> Iterator[tuple[Place, Row | RowError]]:
    data = content(chunk)
    ends = [separator.at for separator in separators([data], 0) if not separator.last]
    spans = list(pairwise([-1, *ends, len(data)]))
    if chunk.first == len(spans) == 1 and not data.strip(WHITE):  # []
        return
    for number, (before, end) in enumerate(spans, chunk.first):
        element = data[before + 1 : end]
        yield Place(number, chunk.start + before + 1, len(element)), object_in(element.strip(WHITE))


class Separator(NamedTuple):
    at: int  # byte
    last: bool  # the list's closing bracket; else a comma


def separators(blocks: Iterable[bytes], at: int) -> Iterator[Separator]:
    """The commas between the elements of a list, and its closing bracket, in the bytes after its opening one.

    What the elements are is not looked at: brackets are counted, and strings passed over.
    """
    depth, inside, held = 0, False, b""
    for block in blocks:
        block, held = held + block, b""
        place = 0
        while place < len(block):
            place = (INSIDE if inside else OUTSIDE).match(block, place).end()
            if place == len(block):
                break
            byte = block[place : place + 1]
            if byte == b"\\":  # what it stands before is in the next block
                held = byte
                at -= 1
                place += 1
                break
            if byte == b'"':
                inside = not inside
            elif byte in b"[{":
                depth += 1
            elif byte in b"]}" and depth:
                depth -= 1
            elif byte in b"]}":
                yield Separator(at + place, True)
                return
            elif not depth:
                yield Separator(at + place, False)
            place += 1
        at += len(block)


def blocks_of(file: BinaryIO, size: int = 1 << 20) -> Iterator[bytes]:
    while block := file.read(size):
        yield block


def check_nothing_follows(path: Path, file: BinaryIO) -> None:
    for block in blocks_of(file):
        if block.strip(WHITE):
            raise UserError(f"{path}: something follows its list; {LINES_ARE_ELSEWHERE}")


# ---- .parquet ------------------------------------------------------------------------------------------------------


SLICES = 8  # of a row group at most: what is before a slice is decoded again for it


def parquet_chunks(path: Path, size: int) -> Iterator[Chunk]:
    """Slices of row groups, each alike."""
    groups, start = opened_parquet(path).metadata, 0
    for group in map(groups.row_group, range(groups.num_row_groups)):
        slices = max(1, min(SLICES, group.total_byte_size // size, group.num_rows))
        edges = [start + number * group.num_rows // slices for number in range(slices + 1)]
        for begin, stop in pairwise(edges):
            yield Chunk(str(path), begin, stop, begin + 1)
        start += group.num_rows


def parquet_rows(chunk: Chunk) -> Iterator[tuple[Place, Row | RowError]]:
    file = opened_parquet(Path(chunk.path))
    before = 0  # rows
    for group in range(file.metadata.num_row_groups):
        after = before + file.metadata.row_group(group).num_rows
        if before < chunk.stop and chunk.start < after:
            yield from group_rows(file, group, before, chunk)
        before = after


def group_rows(file: Any, group: int, before: int, chunk: Chunk) -> Iterator[tuple[Place, Row | RowError]]:
    """The rows of the chunk that are in this row group, which has so many rows before it."""
    import pyarrow

    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], use_threads=False):
            if before < chunk.stop and chunk.start < before + batch.num_rows:
                for number, row in enumerate(batch.to_pylist(), before):
                    if chunk.start <= number < chunk.stop:
                        yield Place(number + 1, number, 1), row
            before += batch.num_rows
            if chunk.stop <= before:
                return
    except (pyarrow.ArrowException, ValueError) as error:  # two fields of one name in a struct are a ValueError
        raise UserError(f"{chunk.path}: not a whole parquet file: {error}") from None


def opened_parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: parquet files are read with pyarrow: pip install 'minitune[parquet]'") from None
    try:
        file = ParquetFile(path, pre_buffer=False)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file: {error}") from None
    names = file.schema_arrow.names
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{path}: it has two columns of one name: {', '.join(map(shown, twice))}; rename one of each")
    return file


READERS = {
    ".json": Reader("row", list_chunks, json_rows),
    ".jsonl": Reader("line", line_chunks, jsonl_rows),
    ".txt": Reader("line", text_chunks, text_rows),
    ".parquet": Reader("row", parquet_chunks, parquet_rows),
}


# ---- bytes -----------------------------------------------------------------------------------------------------------


def content(chunk: Chunk) -> bytes:
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        return file.read(chunk.stop - chunk.start)


def after_bom(file: BinaryIO) -> int:
    """Go past a byte order mark at the beginning of a file; where that leads to."""
    if file.read(3) != codecs.BOM_UTF8:
        file.seek(0)
    return file.tell()
