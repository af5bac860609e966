"""Tokenised data on disk: made once, found again by what it was made from, and verified before it is used.

    CACHE/KEY/
        marked              every token of every document, in the order of the rows, marked where it is to be learned
        number, place, ...  the table: a file a column, an entry for each document and for each row that gives none
        sketches            of each entry, by which near duplicates are found
        reasons.jsonl       why a row cannot be used, for each such row in turn
        store.json          what it is, and size and sha256 of each file

The key is a digest of everything that decides what stands in the store, and of nothing else. A store is a folder that
appears by one rename, so it is there whole or not at all.

Tokens are read by `pread`, not through a memory map: pages of a map that were touched count as this process's memory
until the system wants them back, so a run over a large store would seem to hold, and on a machine with a limit be
charged for, all of it. The system's own cache of the file serves both equally fast.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from minitune import files
from minitune.config import DataConfig
from minitune.data.corpus import unmark
from minitune.data.duplicates import IDENTITY, KEYS
from minitune.data.objects import Row, RowError
from minitune.data.readers import CHUNK, Place, chunks, origin, row_at
from minitune.data.tokenise import BAD, COLUMNS, Portion, Task
from minitune.data.workers import cores, stated, tokenised
from minitune.errors import UserError
from minitune.tokenizer import Tokenizer

SMALLEST, WORTH_A_PROCESS = 256 << 10, 2 << 20  # bytes of a chunk, and that a process more is started for
CATEGORIES = 10_000  # names that are kept; what comes after is counted together
DECIDES = ("columns", "template", "train_on_prompt", "max_seq_len", "overlong", "category")  # keys of data.*


@dataclass(frozen=True)
class Source:
    """A file of the recipe."""

    name: str  # as the recipe writes it
    path: Path
    digest: str  # sha256
    format: str  # of its rows; never auto


@dataclass(frozen=True, eq=False)
class Store:
    """A finished store. Nothing of it is held in memory; `column` and `tokens` read what is asked for."""

    folder: Path
    sources: list[Source]
    about: dict[str, Any]  # store.json
    temporary: tempfile.TemporaryDirectory | None = None  # removed with the last use of this store

    def __len__(self) -> int:
        """Entries: documents, and rows that give none."""
        return self.about["entries"]

    def column(self, name: str) -> np.ndarray:
        """A column of the table, (entries,), read from disk at each call. tokenise.COLUMNS lists them."""
        return np.fromfile(self.folder / name, self.about["columns"][name])

    @property
    def categories(self) -> list[str]:
        return self.about["categories"]

    def sketches(self, entries: np.ndarray) -> "Sketches":
        """Those of some entries, for duplicates.groups."""
        return Sketches(self.folder / "sketches", entries)

    @cached_property
    def marked(self) -> "TokenFile":
        return TokenFile(self.folder / "marked")

    @property
    def marked_digest(self) -> str:
        return self.about["files"]["marked"]["sha256"]

    def tokens(self, entry: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and marks of a document."""
        start, tokens = self.value("start", entry), self.value("tokens", entry)
        return unmark(self.marked[start : start + tokens])

    def row(self, entry: int) -> Row | RowError:
        """The row of an entry, read from its file again."""
        place = Place(*(self.value(name, entry) for name in ("number", "place", "size")))
        return row_at(self.sources[self.value("file", entry)].path, place)

    def origin(self, entry: int) -> str:
        """Where the row of an entry stands: "train.jsonl:12"."""
        source = self.sources[self.value("file", entry)]
        return origin(source.path, self.value("number", entry), source.name)

    def value(self, name: str, entry: int) -> int:
        dtype = np.dtype(self.about["columns"][name])
        return int(np.fromfile(self.folder / name, dtype, count=1, offset=int(entry) * dtype.itemsize)[0])

    def reasons(self) -> Iterator[tuple[int, str, str]]:
        """(entry, key path, sentence) of each row that cannot be used."""
        bad = np.flatnonzero(self.column("flags") & BAD)
        with open(self.folder / "reasons.jsonl", encoding="utf-8", newline="\n") as file:
            for entry, line in zip(bad.tolist(), file, strict=True):
                yield entry, *json.loads(line)


class TokenFile:
    """A file of uint32 that is indexed by slices, as an array is."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115  (read for as long as this is)

    def __getitem__(self, span: slice) -> np.ndarray:
        wanted = 4 * (span.stop - span.start)
        data = os.pread(self.file.fileno(), wanted, 4 * span.start)
        if len(data) != wanted:
            raise UserError(f"{self.file.name} has become shorter while it was in use; run again")
        return np.frombuffer(data, "<u4")


class Sketches:
    """Rows of KEYS uint64 in a file, indexed as an array is: `[:, key]` is a column, `[rows]` are some rows. Of the
    file a block is in memory at a time."""

    BLOCK = 1 << 16  # rows

    def __init__(self, path: Path, entries: np.ndarray) -> None:
        self.path, self.entries = path, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: np.ndarray | tuple[slice, int]) -> np.ndarray:
        if isinstance(index, tuple):
            return self.column(index[1])[self.entries]
        rows = np.empty((len(index), KEYS), np.uint64)
        with open(self.path, "rb", buffering=0) as file:
            for row, entry in zip(rows, self.entries[index].tolist(), strict=True):
                file.seek(entry * rows.itemsize * KEYS)
                file.readinto(row)
        return rows

    def column(self, key: int) -> np.ndarray:
        blocks = [np.empty(0, np.uint64)]
        with open(self.path, "rb") as file:
            while len(block := np.fromfile(file, np.uint64, self.BLOCK * KEYS)):
                blocks.append(block[key::KEYS].copy())
        return np.concatenate(blocks)


# ---- making one, or finding it -------------------------------------------------------------------------------------


def open_store(sources: list[Source], cfg: DataConfig, tokenizer: Tokenizer) -> Store:
    """The store of these files; made if it is not in the cache, or is damaged there."""
    key = key_of(sources, cfg, tokenizer)
    if cfg.cache == "none":
        temporary = tempfile.TemporaryDirectory(prefix="minitune-")
        folder = Path(temporary.name) / key
        make(folder, sources, cfg, tokenizer)
        return Store(folder, sources, files.read_json(folder / "store.json"), temporary)
    folder = cache_folder(cfg.cache) / key
    with locked(folder):  # another process that wants the same waits, and then finds it
        if damage(folder):
            make(folder, sources, cfg, tokenizer)
    return Store(folder, sources, files.read_json(folder / "store.json"))


def cache_folder(name: str) -> Path:
    """Where stores are kept: data.cache, or the place that the XDG standard has for caches."""
    if name != "auto":
        folder = Path(name)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitune" / "data"
    try:
        files.make_folder(folder)
    except UserError as error:
        raise UserError(f"data.cache: {error}; name another folder, or none") from None
    return folder


def key_of(sources: list[Source], cfg: DataConfig, tokenizer: Tokenizer) -> str:
    """A digest of everything that decides what stands in a store."""
    about = {
        "files": [(source.digest, source.path.suffix.lower(), source.format) for source in sources],
        "keys": {key: getattr(cfg, key) for key in DECIDES},
        "sketches": None if cfg.near_duplicates == "off" else IDENTITY,
        "tokenizer": stated(tokenizer),
        "code": code_digest(),
        "libraries": [version(name) for name in ("tokenizers", "jinja2", "numpy")],
        "python": platform.python_version(),  # its tables of Unicode
    }
    if "strftime_now" in (tokenizer.chat_template or ""):
        about["date"] = date.today().isoformat()  # which the template writes into the prompts
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def code_digest() -> str:
    """Of the code that makes tokens of rows."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(here.glob("*.py")), here.parent / "tokenizer.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a store's name; the system lets it go when this process ends, however it does."""
    with open(folder.with_name(f"{folder.name}.lock"), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"data.cache: {folder.parent} cannot be locked ({error.strerror}); name another") from None
        yield


def damage(folder: Path) -> str | None:
    """What is wrong with a store, or None."""
    try:
        about = files.read_json(folder / "store.json")
        for name, what in about["files"].items():
            path = folder / name
            if path.stat().st_size != what["size"] or files.sha256(path) != what["sha256"]:
                return f"{name} is not what it was"
    except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def make(folder: Path, sources: list[Source], cfg: DataConfig, tokenizer: Tokenizer) -> None:
    """Tokenise all files into a new store."""
    sweep(folder.parent)
    size = sum(source.path.stat().st_size for source in sources)
    at_once = max(SMALLEST, min(CHUNK, size // (4 * cores())))
    tasks = [
        Task(chunk, number, source.format)
        for number, source in enumerate(sources)
        for chunk in chunks(source.path, at_once)
    ]
    processes = max(1, min(cores(), len(tasks), size // WORTH_A_PROCESS))
    try:
        with files.new_folder(folder) as part, closing(tokenised(tasks, cfg, tokenizer, processes)) as made:
            portions = tqdm(
                made,
                desc="tokenising",
                total=len(tasks),
                unit="part",
                disable=processes == 1 or not sys.stdout.isatty(),
                dynamic_ncols=True,
            )
            about = write(part, portions)
            for source in sources:
                if files.sha256(source.path) != source.digest:
                    raise UserError(f"{source.name} was changed while it was read; run again when it stays as it is")
            about["files"] = {path.name: described(path) for path in sorted(part.iterdir())}
            files.write_json(part / "store.json", about)
    except OSError as error:
        raise UserError(f"data.cache: {folder.parent} cannot be written to ({error.strerror})") from None


def write(part: Path, portions: Iterable[Portion]) -> dict[str, Any]:
    """Lay the portions end to end; what store.json says of them."""
    entries = tokens = 0
    columns: dict[str, str] = {}
    categories: dict[str, int] = {}
    with ExitStack() as stack:

        def opened(name: str) -> BinaryIO:
            return stack.enter_context(open(part / name, "wb"))

        reasons, marked, sketches = opened("reasons.jsonl"), opened("marked"), opened("sketches")
        table = {name: opened(name) for name in COLUMNS}
        for portion in portions:
            portion.columns["start"] += tokens
            names = [known(name, categories) for name in portion.categories]
            portion.columns["category"] = np.array([*names, -1], "<i4")[portion.columns["category"]]
            for name, column in portion.columns.items():
                table[name].write(column)
                columns[name] = column.dtype.str
            marked.write(portion.marked)
            sketches.write(portion.sketches)
            reasons.writelines(json.dumps(reason).encode() + b"\n" for reason in portion.reasons)
            entries, tokens = entries + len(portion.columns["start"]), tokens + len(portion.marked)
        for file in (reasons, marked, sketches, *table.values()):
            file.flush()
            os.fsync(file.fileno())
    return {"entries": entries, "columns": columns or COLUMNS, "categories": list(categories)}


def known(category: str, categories: dict[str, int]) -> int:
    """The number of a category; a new one gets the next, unless there are too many."""
    if category not in categories and len(categories) >= CATEGORIES:
        category = "(other)"
    return categories.setdefault(category, len(categories))


def described(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def sweep(cache: Path) -> None:
    """Remove what processes left that were ended while they made a store. Those at work hold a lock."""
    for part in cache.glob(".*.part"):
        with suppress(OSError), open(part.with_name(f"{part.name[1:-5]}.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part, ignore_errors=True)
