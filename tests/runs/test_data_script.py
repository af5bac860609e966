"""scripts/data.py: the counts of a training by the same recipe, and nothing trained."""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Start

from minitune.pretrained import TINY

SCRIPT = Path(__file__).parents[2] / "scripts" / "data.py"
CONTRACT = {"rows", "skipped", "duplicates", "near_duplicates", "overlap", "train_documents", "eval_documents"} | {
    "tokens", "trained_tokens", "packed_rows", "fill",
}  # fmt: skip
See = Callable[..., tuple[int, str, str]]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> See:
    """see("argument", ...) -> exit code, stdout and stderr of the script."""

    def go(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Rows of every fate: used, the same, nearly the same, too long, unusable."""
    path = tmp_path / "mixed.jsonl"
    rows = [{"instruction": f"Say {n} things.", "input": "", "output": f"thing {n} " * (n % 9 + 1)} for n in range(40)]
    words = [f"word{n * 7919 % 97}" for n in range(30)]
    rows += [{"instruction": "Go on.", "input": "", "output": " ".join([*words, end])} for end in ("up", "up", "down")]
    rows += [{"instruction": "Talk.", "input": "", "output": "talk " * 300}, {"instruction": "No output."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.near_duplicates=remove", "data.overlong=truncate"),
        ("data.deduplicate=false", "data.packing=false"),
        ("data.eval_fraction=0", "data.near_duplicates=off"),
    ],
)
def test_json_holds_the_counts_of_a_training(
    overrides: tuple[str, ...], start: Start, see: See, mixed: Path, tmp_path: Path
) -> None:
    asked = (f"data.train={mixed}", "data.bad_rows=skip", "data.max_seq_len=192", "data.checks=warn", *overrides)
    code, out, err = see(str(tmp_path / "recipe.toml"), f"out={tmp_path / 'run'}", *asked, "--json")
    assert code == 0 and err == "" and not (tmp_path / "run").exists()
    [line] = out.splitlines()
    seen = json.loads(line)
    assert seen.keys() >= CONTRACT and seen["rows"] == 45 and seen["skipped"] == 1

    run, facts = start("run", *asked, "train.max_steps=1", "eval.every_steps=1", "save.every_steps=0")
    written = json.loads((run / "run.json").read_text())["data"]
    assert {key: seen[key] for key in written} == written == facts["data"] and written.keys() >= CONTRACT
    other = see(str(tmp_path / "recipe.toml"), *asked, "data.max_seq_len=160", "--json")[1]
    assert json.loads(other)["tokens"] != written["tokens"] or json.loads(other)["fill"] != written["fill"]


def test_text_and_page(see: See, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a folder that holds a tokenizer and no weights."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\npath = "{folder}"\n[data]\ntrain = ["{mixed}"]\nmax_seq_len = 192\n')
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    code, out, err = see(str(recipe), "--html", str(tmp_path / "page.html"))
    assert code == 0 and err == "" and "\x1b" not in out
    for words in ("What the model learns", "Left out", "Lengths", "Packing", "Repeats", "Categories", "Worth a look"):
        assert words in out and words in (tmp_path / "page.html").read_text()
    assert "mixed.jsonl:45" in out and f"The page is in {tmp_path / 'page.html'}" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[30;42m" in see(str(recipe))[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in see(str(recipe))[1]


def test_what_is_wrong_is_said_and_ends_with_2(see: See, tmp_path: Path) -> None:
    for arguments, words in (
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.tarin=x.jsonl"], "data.tarin"),
        (["--html", str(tmp_path / "no" / "page.html")], "there is no folder"),
        (["--html", str(tmp_path)], "is a folder; name a file in it"),
        (["--page"], "no such option"),
    ):
        code, out, err = see(*arguments)
        assert code == 2 and words in err and "Traceback" not in err and out == ""


def test_the_page_is_written_whole_or_not_at_all(see: See, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert see("--html", str(page))[0] == 0 and page.read_text().endswith("</html>\n")
    assert os.listdir(tmp_path) == ["page.html"]
