"""10,000 rows with 100 bad ones of ten kinds among them: each is named, and no good one is lost."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minitune.config import EXAMPLE, DataConfig
from minitune.data import prepare
from minitune.data.formats import BadRow, read
from minitune.errors import UserError
from minitune.tokenizer import load_tokenizer

TINY = EXAMPLE.parent
ROWS, EACH = 10_000, 10


def says(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def chat(number: int) -> list[dict]:
    return [says("user", f"What comes after {number}?"), says("assistant", f"{number + 1} does.")]


def line(messages: object) -> bytes:
    return json.dumps({"messages": messages}).encode()


def with_null(number: int) -> list[dict]:
    asked, answered = chat(number)
    call = {"type": "function", "function": {"name": None, "arguments": "{}"}}
    return [asked, answered | {"tool_calls": [call]}]


# kind -> (the line of row n, the key at fault, the reason); an over-long row is not bad but too long
KINDS: dict[str, tuple[Callable[[int], bytes], str, str]] = {
    "invalid UTF-8": (lambda n: line(chat(n)).replace(b"does", b"do\xff"), "", "not valid UTF-8 at byte "),
    "lone surrogate": (
        lambda n: line(chat(n)).replace(b"does", rb"\ud83d"),
        "messages[1].content",
        "messages[1].content holds half a surrogate pair",
    ),
    "NUL": (
        lambda n: line(chat(n)).replace(b"What", rb"\u0000What"),
        "messages[0].content",
        "messages[0].content holds a NUL character, its character 1",
    ),
    "broken JSON": (lambda n: line(chat(n))[:-3], "", "not valid JSON at column "),
    "wrong type": (
        lambda n: line([says("user", n), chat(n)[1]]),
        "messages[0].content",
        "messages[0].content is a number, not text",
    ),
    "missing column": (
        lambda n: json.dumps({"message": chat(n)}).encode(),
        "messages",
        "messages is missing; there is",
    ),
    "empty answer": (
        lambda n: line([chat(n)[0], says("assistant", " \n")]),
        "messages[1].content",
        "messages[1].content is empty",
    ),
    "wrong role order": (
        lambda n: line([*chat(n), chat(n)[1]]),
        "messages[2]",
        "messages[2] is out of order: assistant follows assistant",
    ),
    "nested null": (
        lambda n: line(with_null(n)),
        "messages[1].tool_calls[0].function.name",
        "messages[1].tool_calls[0].function.name is null",
    ),
    "over-long": (lambda n: line([chat(n)[0], says("assistant", f"{n} is not all. " * 400)]), "", ""),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """The file, and the kind of each bad line."""
    draw = random.Random(7)
    numbers = draw.sample(range(2, ROWS + 1), EACH * len(KINDS))  # the first row says what format it is
    kinds = dict(zip(numbers, sorted(KINDS) * EACH, strict=True))
    lines = [KINDS[kinds[n]][0](n) if n in kinds else line(chat(n)) for n in range(1, ROWS + 1)]
    path = tmp_path_factory.mktemp("spoilt") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, kinds


def test_each_bad_row_is_named_by_line_key_and_reason(spoilt):
    path, kinds = spoilt
    found = {number: row for number, row in enumerate(read(path), 1) if isinstance(row, BadRow)}
    assert sorted(found) == sorted(number for number, kind in kinds.items() if kind != "over-long")
    for number, row in found.items():
        _, key, reason = KINDS[kinds[number]]
        assert (row.origin, row.key) == (f"{path}:{number}", key)
        assert row.reason.startswith(reason), kinds[number]


def test_a_list_of_rows_names_them_by_number(spoilt, tmp_path):
    """Of a JSON list, whose brackets must close, the rows whose lines are whole."""
    path, kinds = spoilt
    lines = path.read_bytes().split(b"\n")[:3000]
    whole = [(number, line) for number, line in enumerate(lines, 1) if kinds.get(number) != "broken JSON"]
    listed = tmp_path / "rows.json"
    listed.write_bytes(b"[" + b",\n".join(line for _, line in whole) + b"]")
    found = [(row.origin, row.key) for row in read(listed) if isinstance(row, BadRow)]
    bad = [
        (place, kinds[number])
        for place, (number, _) in enumerate(whole, 1)
        if kinds.get(number, "over-long") != "over-long"
    ]
    assert len(bad) > 1
    assert found == [(f"{listed} row {place}", KINDS[kind][1]) for place, kind in bad]


def recipe(path: Path) -> DataConfig:
    return replace(DataConfig(train=(str(path),)), template="chat", max_seq_len=256, overlong="drop", cache="none")


def test_skipping_keeps_exactly_the_good_rows(spoilt, tmp_path):
    path, kinds = spoilt
    got = prepare(replace(recipe(path), bad_rows="skip"), load_tokenizer(TINY))
    assert got.counts["train_documents"] + got.counts["eval_documents"] == ROWS - len(kinds) == 9_900
    assert (got.counts["skipped"], got.counts["dropped"]) == (90, 10)
    tokenizer, answers = load_tokenizer(TINY), set()
    for corpus in (got.train, got.eval):
        for number in range(len(corpus)):
            ids, trained = corpus[number]
            answers.add(tokenizer.decode(ids[trained].tolist()))
    assert answers == {f"{number + 1} does." for number in range(1, ROWS + 1) if number not in kinds}

    listed = {row["line"]: row for row in got.left_out()}
    assert sorted(listed) == sorted(kinds)
    for number, kind in kinds.items():
        if kind != "over-long":
            assert listed[number]["key"] == KINDS[kind][1]
            assert listed[number]["reason"].startswith(KINDS[kind][2])


def test_without_skipping_the_first_are_named_with_what_to_do(spoilt):
    path, kinds = spoilt
    with pytest.raises(UserError, match=r'90 rows cannot be used; .*bad_rows = "skip"') as error:
        prepare(recipe(path), load_tokenizer(TINY))
    first = sorted(number for number, kind in kinds.items() if kind != "over-long")[:10]
    lines = str(error.value).splitlines()
    for number, line in zip(first, lines[1:], strict=False):
        assert line.strip().startswith(f"{path}:{number}: {KINDS[kinds[number]][2]}")
    assert lines[11].strip() == "and 80 more"


def test_a_run_ends_before_its_model_is_loaded(tmp_path):
    """Its weights are no weights, which is found out where they are read: with the bad rows skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*(line(chat(n)) for n in range(40)), *(spoil(1) for spoil, _, _ in KINDS.values())]))
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    keys = {"model.path": model, "data.template": "chat", "data.cache": "none", "out": tmp_path / "run"}
    keys |= {"data.train": json.dumps([str(path)]), "data.max_seq_len": 256}

    def train(**more: object) -> subprocess.CompletedProcess:
        arguments = [f"{key}={value}" for key, value in {**keys, **more}.items()]
        script = Path(__file__).parents[2] / "scripts" / "train.py"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=240)

    refused = train()
    assert refused.returncode == 2
    assert "9 rows cannot be used" in refused.stderr
    for number, (_, _, reason) in enumerate(list(KINDS.values())[:9], 41):
        assert f"{path}:{number}: {reason}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "safetensors" not in refused.stderr
    control = train(**{"data.bad_rows": "skip", "data.checks": "warn"})
    assert control.returncode == 2
    assert "model.safetensors" in control.stderr
