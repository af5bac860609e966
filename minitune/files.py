"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed."""

import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from minitune import secrets
from minitune.errors import UserError
from minitune.foreign import read_json as read_json  # what is read here was written here, or says that it was

if TYPE_CHECKING:
    from torch import Tensor

PIECE, LINES = 2**24, 1000  # bytes, and lines of JSON, at a time
DTYPES = {  # safetensors' names, in the order in which its files hold them
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill; when the block ends well it takes the place of `path` in one step.

    A reader, or a crash, sees the old file or the new one. Its mode follows the umask.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # of a run that was killed, and whose number this one has got
    try:
        with open(part, "xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_bytes(path: Path, data: bytes) -> str:
    """Returns the sha256 of what was to be written."""
    with replacing(path) as file:
        write_all(file, data)
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> str:
    """A text for people, without secrets; what must stay exact is for `write_bytes`."""
    return write_bytes(path, secrets.hidden(text).encode())


def write_json(path: Path, value: object) -> str:
    text = json.dumps(secrets.hidden_in(value), indent=2, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, f"{text}\n".encode())


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """JSON, an object a line."""
    with replacing(path) as file:
        lines = io.BufferedWriter(file)
        while some := list(islice(rows := iter(rows), LINES)):
            lines.writelines(json.dumps(row).encode() + b"\n" for row in secrets.hidden_in(some))
        lines.flush()
        lines.detach()


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> str:
    """Write a safetensors file with the metadata that transformers and PEFT expect; returns the sha256 of its bytes.

    Byte for byte what the library writes, tensor by tensor and digested on the way. The library's own writer would
    hold all of it twice, flush nothing, and tell of a full disk by an error of its own.
    """
    kinds = {name: DTYPES[str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (list(DTYPES.values()).index(kinds[name]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": kinds[name], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(path) as file:
        for piece in (len(text).to_bytes(8, "little"), text, *map(raw_bytes, map(tensors.get, order))):
            digest.update(piece)
            write_all(file, piece)
    return digest.hexdigest()


def raw_bytes(tensor: "Tensor") -> memoryview:
    """The bytes of a tensor, row by row."""
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of it: a single call may take less."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest[:PIECE]) :]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder; when the block ends well it becomes `path`, replacing what was there. The folder it is
    to be in is not made.

    If the block raises, `path` is as it was. A process killed in between leaves `path` or, in the moment between the
    two renames, what was there under another name; `sweep` puts that back, and clears the temporary folder.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    put_back(old)
    for leftover in (part, old):
        remove(leftover)
    part.mkdir()  # whose parent is there, or has gone while a run was in it
    try:
        yield part
        sync(part)
        if os.path.lexists(path):
            os.replace(path, old)
        try:
            os.replace(part, path)
        except OSError:
            put_back(old)
            raise
        sync(path.parent)
        remove(old)
    finally:
        remove(part)


def sweep(folder: Path, *names: str) -> None:
    """Clear away what writers of `names` (patterns) that were killed left half-made in a folder, which nobody else may
    be writing to. Other hidden files there are somebody's own."""
    for name in names:
        for old in folder.glob(f".{name}.old"):
            put_back(old)
        for pattern in (f".{name}.part", f".{name}.*.part", f".{name}.old"):
            for leftover in folder.glob(pattern):
                remove(leftover)


def put_back(old: Path) -> None:
    """Give `.name.old` its name again, if nothing has taken its place."""
    path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if os.path.lexists(old) and not os.path.lexists(path):
        os.replace(old, path)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there and as far as it can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make sure that `path` is a folder that can be written to, or raise UserError."""
    try:
        make_parents(path)
        probe = path / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may be trying the same folder
    except OSError as error:
        raise UserError(f"{path} cannot be written to: {error.strerror}") from None


def make_parents(path: Path) -> None:
    """Make a folder and those above it, each of them safe on the disk."""
    if not path.is_dir():
        make_parents(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def set_aside(path: Path, mark: str) -> Path:
    """Rename what is in the way, so that it is in nobody's way and not lost: `path.mark`, or with a number after it."""
    number, aside = 1, path.with_name(f"{path.name}.{mark}")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{mark}.{number}")
    os.rename(path, aside)
    sync(path.parent)
    return aside


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a plain file of at most `most`. No link is followed, and no pipe or device waited for.

    Raises:
        OSError: it is not there, is something else, or cannot be read.
        ValueError: it is larger.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path} is no plain file")
        if facts.st_size > most:
            raise ValueError(f"{path} has {facts.st_size:,} bytes; at most {most:,} are read")
        return file.read(most + 1)


def is_plain(path: Path) -> bool:
    """Whether `path` is a file: no link, folder, pipe or device."""
    return os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode)


def sync(path: Path) -> None:
    """Flush a file's or a folder's own entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget(path: Path) -> None:
    """Drop the system's copy of a file that is safe on the disk, so that it is the disk that is read next."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
