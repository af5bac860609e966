"""Reading what nobody vouches for: regular files alone, JSON within limits, safetensors headers to the letter."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitune import foreign, header
from minitune.errors import UserError


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, -3e2, null, true, "é\\u00e9\\n"], "b": {"c": {}}}', "{}", '\ufeff{"a": 1}']
)
def test_json_is_read_as_json_reads_it(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert foreign.read_json(path) == json.loads(text.removeprefix("\ufeff"))


def depth(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ('{"b": {"a": 1, "c": 2, "a": 3}}', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ('{"a": 1e400}', "1e400 is no number"),
        ('{"a": ' + "9" * 401 + "}", "401 digits"),
        ('{"a": 0.' + "9" * 401 + "}", "no number that can be computed with"),
        (depth(65), "nested more than 64 levels"),
        ("[" * 100_000, "nested more than 64 levels"),
        ('{"a": [' + "1," * 3_000_000 + "1]}", "more than 3,000,000 values"),
        ("[1]", "must hold a JSON object"),
        ("", "is no JSON"),
    ],
)
def test_json_beyond_the_limits_is_refused(text, words, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=words):
        foreign.read_json(tmp_path / "a.json")


def test_json_within_the_limits_is_not(tmp_path):
    (tmp_path / "a.json").write_text(depth(63))
    foreign.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": ' + "9" * 400 + "}")
    assert foreign.read_json(tmp_path / "a.json")["a"] == 10**400 - 1


def test_a_file_that_grows_while_it_is_read_is_bounded(tmp_path):
    """The kernel's own files say that they have 0 bytes."""
    with pytest.raises(UserError, match="more than 10 bytes"):
        foreign.read_bytes(Path("/proc/self/maps"), most=10)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socketless"])
def test_only_regular_files_are_opened(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"is no regular file|is a folder|is missing"):
        foreign.read_bytes(path)


# ---- headers


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.ones(3, dtype=torch.int8),
    }
    save_file(tensors | {"d": torch.tensor(7, dtype=torch.bfloat16)}, path, {"format": "pt"})
    return path


def test_a_header_is_read_as_the_library_reads_it(weights):
    read = header.read_header(weights)
    with safe_open(weights, "pt") as file:
        assert set(read) == set(file.keys())
        for name, entry in read.items():
            piece = file.get_slice(name)
            assert (entry.shape, entry.dtype) == (tuple(piece.get_shape()), piece.get_dtype())


def test_what_the_library_refuses_is_refused(weights, tmp_path):
    """Random damage to a file: the header check is never the more lenient of the two, and raises nothing else."""
    draw = random.Random(0)
    sound = weights.read_bytes()
    refused = lenient = 0
    for _ in range(3000):
        damaged = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(min(len(damaged), 420))
            way = draw.randrange(3)
            if way == 0:
                damaged[at] = draw.choice(b'0123456789[]{},:" \\abF_') if at >= 8 else draw.randrange(256)
            elif way == 1:
                del damaged[at]
            else:
                damaged.insert(at, draw.choice(b'0123456789[]{},:"'))
        if draw.random() < 0.5 and len(damaged) != len(sound):  # the header's own length set right
            damaged[:8] = struct.pack("<Q", struct.unpack("<Q", sound[:8])[0] + len(damaged) - len(sound))
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damaged)
        try:
            header.read_header(path)
            ours = True
        except UserError:
            ours = False
        try:
            with safe_open(path, "pt") as file:
                file.keys()
            theirs = True
        except (SafetensorError, OSError):
            theirs = False
        refused += not ours
        lenient += ours and not theirs
    assert lenient == 0
    assert 500 < refused < 3000


@pytest.mark.parametrize("name", ["../../etc/x", "a\nb", "", "x" * 600, "a b"])
def test_names_that_the_library_takes_are_refused(name, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1)}, path)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == [name]  # why this check is here
    with pytest.raises(UserError, match="is no name of a tensor"):
        header.read_header(path)
