"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from minitune import secrets
from minitune.errors import UserError
from minitune.foreign import read_json as read_json  # what is read here was written here, or says that it was


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: a reader, or a crash, sees the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(secrets.hidden_in(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the metadata that transformers and PEFT expect."""
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, part, {"format": "pt"})
        os.chmod(part, 0o666 & ~umask())  # safetensors creates files 0600, whatever the umask
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder; when the block ends well it becomes `path`, replacing what was there.

    If the block raises, `path` is as it was. A process killed in between leaves `path` or, in the moment between the
    two renames, what was there under another name; the next call puts that back, and clears the temporary folder.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        sync(part)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(part, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make sure that `path` is a folder that can be written to, or raise UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written to: {error.strerror}") from None


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


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
