"""Ten thousand rows of which a hundred are bad, in ten ways: each is named, and the others are learned from."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitune.config import load_config
from minitune.errors import UserError
from minitune.train import train

ROWS, BAD = 10_000, 100
WAYS: list[Callable[[int], bytes]] = [
    lambda n: b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    lambda n: b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
    lambda n: b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\x00"}]}',
    lambda n: b'{"messages": [{"role": "user", "content": "a"',
    lambda n: b'{"messages": "a"}',
    lambda n: b'{"text": "a"}',
    lambda n: b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}',
    lambda n: b'{"messages": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]}',
    lambda n: b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}',
    lambda n: b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
]


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The file, and the lines that are bad."""
    draw = random.Random(0)
    bad = sorted(draw.sample(range(2, ROWS + 1), BAD))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "wb") as file:
        for number in range(1, ROWS + 1):
            if number in bad:
                file.write(WAYS[bad.index(number) % len(WAYS)](number) + b"\n")
                continue
            said = " ".join(draw.choices(["red", "lamp", "Alice", "seven", "chairs", "Paris", "sends", "to"], k=9))
            ask = {"role": "user", "content": f"{number} {said}"}
            file.write(json.dumps({"messages": [ask, {"role": "assistant", "content": said[::-1]}]}).encode() + b"\n")
    return path, bad


def recipe(path: Path, base: Path, out: Path, *more: str) -> list[str]:
    keys = [f"model.path={base}", "model.dtype=float32", f"data.train={path}", f"out={out}", "method=lora"]
    keys += [
        "eval.early_stopping_patience=0",
        "train.gradient_accumulation_steps=1",
        "data.template=alpaca",
        "data.max_seq_len=256",
        "train.max_steps=1",
        "log.tensorboard=false",
    ]
    return [*keys, "data.eval_fraction=0.001", "eval.every_steps=0", "train.batch_size=1", *more]


def test_bad_rows_are_an_error_that_names_them(ten_thousand: Any, small_base: Path, tmp_path: Path) -> None:
    path, bad = ten_thousand
    with pytest.raises(UserError) as refused:
        train(load_config(recipe(path, small_base, tmp_path / "run")))
    first, *listed, rest = str(refused.value).splitlines()
    assert first.startswith("100 rows cannot be used")
    assert [line.split(": ")[0].strip() for line in listed] == [f"{path}:{number}" for number in bad[:10]]
    assert rest == "  and 90 more"
    assert not (tmp_path / "run").exists()


def test_bad_rows_that_are_skipped_are_all_written_down(
    ten_thousand: Any, small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bad = ten_thousand
    facts = train(load_config(recipe(path, small_base, tmp_path / "run", "data.bad_rows=skip")))["data"]
    assert (facts["rows"], facts["skipped"]) == (ROWS, BAD)
    assert facts["train_documents"] + facts["eval_documents"] == ROWS - BAD
    said = capsys.readouterr().out  # the checks of the preview, short
    assert "100 of 10000 rows cannot be used and are skipped" in said and f"{path}:" in said
    assert ", as the model meets it: after " in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == bad
    assert {(row["file"], row["fate"]) for row in rows} == {(str(path), "bad")}
    assert len({row["reason"] for row in rows}) >= len(WAYS) - 1
    keys = [row["key"] for row in rows[: len(WAYS)]]
    assert keys[6] == "messages[1].content" and keys[8] == "messages[0].content"
