"""The header of a safetensors file, checked before anything else opens it.

The library refuses most malformed headers; it takes names that stand twice, names with slashes or line breaks, and
whatever memory a header of 100 MB asks for. The format: 8 bytes say how long the header is, then comes the header, a
JSON object from names to dtype, shape and place, then the bytes of the tensors, without gap or overlap.
https://github.com/huggingface/safetensors#format
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minitune.errors import UserError
from minitune.foreign import opened, parse_json
from minitune.secrets import shortened

LONGEST = 8_000_000  # bytes of a header; 10,000 tensors take 1 MB
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,499}")
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    end: int


def open_tensors(path: Path) -> Any:
    """A safetensors file, its header checked: a context manager, as `safetensors.safe_open`."""
    read_header(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from None


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> what the header says of it. Raises UserError unless the whole file is as the format asks."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is no whole safetensors file: its header would reach past its end")
        if length > LONGEST:
            raise UserError(f"{path} has a header of {length:,} bytes; {LONGEST:,} are the most that is read")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise UserError(f"the header of {path} must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"the header of {path}: __metadata__ must be an object of texts")
    entries = {name: entry(name, said, path) for name, said in header.items()}
    at = 0
    for name, each in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if each.start != at:
            raise UserError(f"{path}: the bytes of {name} begin at {each.start}, where {at} is the next place")
        at = each.end
    if at != size - 8 - length:
        there = size - 8 - length
        raise UserError(f"{path} is no whole safetensors file: its header speaks of {at:,} bytes, it holds {there:,}")
    return entries


def entry(name: str, said: Any, path: Path) -> Entry:
    if not NAME.fullmatch(name):
        raise UserError(f"{path}: {shortened(name, 100)!r} is no name of a tensor")
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise UserError(f"{path}: {name} has the dtype {shortened(str(dtype), 50)!r}, which is not known")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: the shape and data_offsets of {name} must be lists of whole numbers")
    start, end = offsets
    if end - start != math.prod(shape) * BYTES[dtype]:
        raise UserError(f"{path}: {name} is said to be {dtype} of {tuple(shape)}, but has {end - start:,} bytes")
    return Entry(dtype, tuple(shape), start, end)


def is_sizes(value: Any) -> bool:
    """Whether a value is a list of a few whole numbers that a file can have."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**48 for each in value)
    )
