"""The safetensors files of a Hugging Face model folder, in and out.

Only safetensors are opened: a pickle (`pytorch_model.bin`) can run code when it is read. The names in a folder's
index are not trusted either: a shard must be a plain file of that folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from minitune import files
from minitune.errors import UserError
from minitune.foreign import inside, read_json
from minitune.header import NAME, Entry, open_tensors, read_header
from minitune.secrets import shortened

if TYPE_CHECKING:  # processes that tokenise come by here, and do without torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_COMPANION = 40_000_000  # bytes; the largest tokenizer.json in use has 33 million
SHARD_BYTES = 5_000_000_000
COMPANIONS = (  # what goes with the weights, byte for byte: rewriting these is a known source of silent damage
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Shards:
    """The safetensors files of a folder, opened without trusting their names. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = shard_names(folder)  # tensor -> file name; for a single file, filled when it opens
        self.stack = ExitStack()
        self.open_files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        single = not self.file_of
        for path in weight_files(self.folder):
            try:
                file = self.stack.enter_context(open_tensors(path))
            except UserError:
                self.stack.close()
                raise
            self.open_files[path.name] = file
            if single:
                self.file_of |= dict.fromkeys(file.keys(), path.name)
        for name, file in self.open_files.items():
            listed = {tensor for tensor, shard in self.file_of.items() if shard == name}
            if listed != set(file.keys()):
                differing = sorted(listed ^ set(file.keys()))
                self.stack.close()
                raise UserError(f"{self.folder / INDEX} and {name} disagree about {', '.join(differing[:5])}")
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def names(self) -> list[str]:
        """All tensors, file by file."""
        return sorted(self.file_of, key=lambda name: (self.file_of[name], name))

    def tensor(self, name: str) -> Tensor:
        return self.open_files[self.file_of[name]].get_tensor(name)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor; the others are not read."""
        return self.open_files[self.file_of[name]].get_slice(name)[rows]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder, checked to lie in it, none of them opened."""
    return [inside(folder, name) for name in sorted(set(shard_names(folder).values()) or {SINGLE})]


def headers(folder: Path) -> dict[str, Entry]:
    """Tensor -> what the headers of a folder's files say of it; no tensor is read."""
    return {name: entry for path in weight_files(folder) for name, entry in read_header(path).items()}


def shard_names(folder: Path) -> dict[str, str]:
    """tensor -> file name from the index; {} for a folder with a single file."""
    if (folder / SINGLE).exists():  # it goes before an index, as in transformers
        return {}
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when it is read; "
                f"minitune opens safetensors alone: take a revision of the model that has {SINGLE}, or convert it"
            )
        raise UserError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")
    weight_map = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: weight_map must be an object from tensor to file")
    for tensor, name in weight_map.items():
        if not NAME.fullmatch(tensor):
            raise UserError(f"{folder / INDEX}: {shortened(tensor, 100)!r} is no name of a tensor")
        if not isinstance(name, str):
            inside(folder, name)  # raises
    for name in sorted(set(weight_map.values())):
        inside(folder, name)
    return weight_map


def save(folder: Path, tensors: Iterable[tuple[str, Tensor]], like: Path) -> None:
    """Write a model folder that transformers loads: `tensors` in shards, and the other files of the base `like` byte
    for byte. Tensors are taken one by one, so the host holds one shard at most. The folder appears when it is whole."""
    files.make_parents(folder.parent)
    with files.new_folder(folder) as part:
        names = write_shards(part, tensors)
        if len(names) > 1:
            total = sum(size for sizes in names.values() for size in sizes.values())
            weight_map = {tensor: name for name, sizes in names.items() for tensor in sizes}
            files.write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copy_companions(like, part)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, int]]:
    """Shards of at most SHARD_BYTES, named as transformers does; returns file name -> tensors in it and their bytes."""
    written = []
    for number, shard in enumerate(in_shards(tensors), start=1):
        files.write_tensors(folder / f"shard-{number}", shard)
        written.append({name: tensor.nbytes for name, tensor in shard.items()})
    if len(written) == 1:
        os.replace(folder / "shard-1", folder / SINGLE)
        return {SINGLE: written[0]}
    names = {}
    for number, sizes in enumerate(written, start=1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        os.replace(folder / f"shard-{number}", folder / name)
        names[name] = sizes
    return names


def in_shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.cpu()
        size += tensor.nbytes
    yield shard


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files of a model folder that are not weights, byte for byte."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(inside(source, name), target / name)
            files.sync(target / name)
