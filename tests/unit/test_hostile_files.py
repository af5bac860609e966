"""Hundreds of files made to harm whoever opens them: each is refused in seconds, in little memory, with a message.

Each case starts from a folder that is sound but for the damage; that the folder without it is accepted is the control.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_files import CASES, SOUND, Case

TESTS = Path(__file__).parents[1]


def ends(cases: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """How the cases of these names end, in one process of limited memory."""
    command = [sys.executable, str(TESTS / "run_hostile.py"), str(folder)]
    done = subprocess.run(
        command, input="\n".join(cases), cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=280
    )
    results = {end["name"]: end for end in map(json.loads, done.stdout.splitlines())}
    assert list(results) == cases, f"the process ended at {cases[len(results)]!r}:\n{done.stderr[-3000:]}"
    return results


def wrong(case: Case, end: dict[str, Any]) -> str:
    """What is wrong with the end of a hostile case, or empty."""
    said = end["said"].lower()
    if end["code"] != 2:
        return f"exit code {end['code']}"
    if end["canary"]:
        return "its code ran"
    if end["cpu"] > 5 or end["seconds"] > 15:
        return f"it took {end['cpu']:.1f} s of CPU, {end['seconds']:.1f} s in all"
    if "traceback" in said or not said.startswith("error: ") or said.count("\n") > 25 or len(said) > 20_000:
        return "no clear message"
    if not any(word in said for word in case.words.split("|")):
        return f"nothing said of {case.words}"
    return ""


def check(cases: list[Case], folder: Path) -> None:
    results = ends([f"sound {kind}" for kind in SOUND] + [case.name for case in cases], folder)
    assert {kind: results[f"sound {kind}"]["code"] for kind in SOUND} == dict.fromkeys(SOUND, 0)
    found = {case.name: wrong(case, results[case.name]) for case in cases}
    bad = {name: (why, results[name]["said"][-300:]) for name, why in found.items() if why}
    assert not bad, json.dumps(bad, indent=1)


@pytest.mark.parametrize("part", range(2))
def test_hostile_files_are_refused(part: int, tmp_path: Path) -> None:
    check(CASES[part::4], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2, 4))
def test_the_other_hostile_files_are_refused(part: int, tmp_path: Path) -> None:
    check(CASES[part::4], tmp_path)


def test_an_accepted_file_would_be_noticed() -> None:
    """The negative control: ends that are wrong, one by one."""
    case = next(case for case in CASES if case.words == "json")
    good = {"code": 2, "canary": False, "cpu": 0.1, "seconds": 0.1, "said": "error: no JSON\n"}
    assert not wrong(case, good)
    for change in ({"code": 0}, {"code": 1}, {"canary": True}, {"cpu": 9}, {"said": "error: no\n"}):
        assert wrong(case, good | change), change
    assert wrong(case, good | {"said": "Traceback (most recent call last)"})


def test_the_cases_are_many_and_their_names_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 400
