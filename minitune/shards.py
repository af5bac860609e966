"""The safetensors files of a Hugging Face model folder, in and out.

Only safetensors are opened: a pickle (`pytorch_model.bin`) can run code when it is read. The names in a folder's
index are not trusted either: a shard must be a plain file of that folder.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitune import files
from minitune.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
                file = self.stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                self.stack.close()
                raise UserError(f"{path} is no whole safetensors file: {error}") from None
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

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """From the file's header; the tensor itself is not read."""
        piece = self.open_files[self.file_of[name]].get_slice(name)
        return tuple(piece.get_shape()), piece.get_dtype()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder, checked to lie in it, none of them opened."""
    return [inside(folder, name) for name in sorted(set(shard_names(folder).values()) or {SINGLE})]


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
    weight_map = files.read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: weight_map must be an object from tensor to file")
    for name in set(map(repr, weight_map.values())):  # each distinct name once; repr, since any JSON may stand there
        inside(folder, next(value for value in weight_map.values() if repr(value) == name))
    return weight_map


def inside(folder: Path, name: object) -> Path:
    """The file `name` of `folder`. Raises UserError, before opening anything, if it would lie elsewhere."""
    plain = isinstance(name, str) and name and not {"/", "\\", "\0"} & set(name) and PurePosixPath(name).name == name
    if not plain or name in (".", ".."):
        raise UserError(f"{folder}: {name!r} is no plain file name, and shards may not lie outside the folder")
    path = folder / name
    try:
        target = path.resolve()
        is_file = target.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long, one that is no text, links in a circle
        raise UserError(f"{folder}: {name[:100]!r} cannot be the name of a file") from None
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # the Hub's cache links its snapshots to blobs beside them
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link that leaves the folder; shards may not lie outside it")
    if not is_file:
        raise UserError(f"{path} is missing")
    return path


def save(folder: Path, tensors: Iterable[tuple[str, Tensor]], like: Path) -> None:
    """Write a model folder that transformers loads: `tensors` in shards, and the other files of the base `like` byte
    for byte. Tensors are taken one by one, so the host holds one shard at most. The folder appears when it is whole."""
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
