"""The studies run, at a size that shows nothing, so that they cannot rot; and their harness is fair."""

import json
import runpy
import sys
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
import torch

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
NAMES = ("rank", "qlora", "target_modules", "alpha", "dropout")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    import harness

    return harness


def test_every_study_runs_and_is_remembered(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    for again in (False, True):
        if again:  # all of it is known: to train would raise
            monkeypatch.setattr(harness, "train", None)
        for name in NAMES[:1] if again else NAMES:
            line = [name, "--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--small"]
            monkeypatch.setattr(sys, "argv", line)
            runpy.run_path(str(STUDIES / f"{name}.py"), run_name="__main__")
            told = json.loads((tmp_path / "out" / f"{name}.json").read_text())
            assert {"question", "sentence", "arms", "versions", "command", "seconds"} <= told.keys()
            assert str(tmp_path) not in json.dumps(told) and told["command"].endswith("--small")
            for arm in told["arms"]:
                assert len(arm["losses"]) == 2 and 0 < arm["mean"] < 20 and arm["spread"] > 0
            drawn = xml.parse(tmp_path / "out" / f"{name}.svg").getroot()
            assert len(drawn.findall(f"{SVG}circle[@class='seed']")) >= 4
            assert not drawn.findall(f".//{SVG}script")
    torch.set_num_threads(threads)
    ranks = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert ranks["arms"][1]["losses"] != ranks["arms"][2]["losses"]  # the arms differ in what they say they do
    assert "rank" in capsys.readouterr().err


@pytest.mark.parametrize(("best", "tries"), [(0, 3), (2, 5), (-3, 6), (9, 6)])
def test_a_search_ends_between_two_worse_ones(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int, tries: int
) -> None:
    bench = harness.Bench(tmp_path, None, small=False)
    asked: list[tuple[Path, int]] = []

    def run(rows: Path, task: Any, keys: dict[str, Any], seed: int) -> dict[str, float]:
        asked.append((rows, seed))
        power = torch.tensor(keys["optim.learning_rate"] / 1e-3).log10().mul(2).round().item()
        return {"loss": 1.0 + abs(power - best)}

    monkeypatch.setattr(bench, "run", run)
    task = bench.tasks["orders"]
    found = bench.search(task, {}, 1e-3)
    assert len(found) == tries == len(asked)
    assert {rows for rows, _ in asked} == {task.tune} and not {seed for _, seed in asked} & set(bench.seeds)
    rates = sorted(found)
    inside = rates[0] < min(found, key=found.get) < rates[-1]
    assert inside == (best != 9)


def test_no_row_is_in_two_parts(harness: Any, tmp_path: Path) -> None:
    task = harness.Bench(tmp_path, None, small=False).tasks["orders"]
    parts = [set(path.read_text().splitlines()) for path in (task.train, task.tune, task.test)]
    assert all(len(part) >= 40 for part in parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_what_was_found_says_how() -> None:
    for name in NAMES:
        told = json.loads((STUDIES / "results" / f"{name}.json").read_text())
        assert told["study"] == name and f"{name}.py" in told["command"] and told["versions"]["torch"]
        assert all(len(arm["losses"]) >= 3 for arm in told["arms"])
        xml.parse(STUDIES / "results" / f"{name}.svg")
