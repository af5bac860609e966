"""The README's commands run as written, its files are there, and its figures are those of the results it links to."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from minitune.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python (scripts/.+)$", README, re.MULTILINE)
SHORT = {"scripts/train.py": ["train.max_steps=6", "eval.samples=4", "log.tensorboard=false"]}  # else two minutes


def run(command: str, folder: Path) -> str:
    script, *arguments = shlex.split(command)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(ROOT / script), *arguments, *SHORT.get(script, [])]
    ended = subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_commands_of_the_example_run_in_their_order(tmp_path: Path) -> None:
    block = README.partition("With the built-in example")[2].partition("With a model and rows of your own")[0]
    commands = re.findall(r"^    python (scripts/.+)$", block, re.MULTILINE)
    assert [command.split()[0] for command in commands] == [
        "scripts/train.py",
        "scripts/generate.py",
        "scripts/merge.py",
        "scripts/generate.py",
    ]
    for command in commands:
        assert run(command, tmp_path).strip()
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_recipes_are_there_and_load() -> None:
    named = set(re.findall(r"scripts/recipes/\w+\.toml", README))
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "scripts" / "recipes").glob("*.toml")}
    for command in COMMANDS:
        script, *arguments = shlex.split(command)
        if script in ("scripts/train.py", "scripts/data.py"):
            keys = list(takewhile(lambda argument: not argument.startswith("--"), arguments))
            load_config([str(ROOT / a) if a.endswith(".toml") else a for a in keys])


def test_the_file_tree_is_the_tree() -> None:
    tree = README.partition("## Files")[2].partition("## How it composes")[0]
    there = [path for path in (ROOT / "minitune").rglob("*.py") if path.name != "__init__.py"]
    there += [*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    missing = [path.name for path in there if not re.search(rf"\b{re.escape(path.name)}", tree)]
    assert not missing
    named = set(re.findall(r"[\w/]+\.py", tree))
    assert named <= {path.name for path in there}


def test_links_lead_somewhere_and_figures_are_the_results() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
    folder = ROOT / "benchmarks" / "results"
    again, earlier = (json.loads((folder / f"H200-2026-11-27{name}.json").read_text()) for name in ("-again", ""))
    results = again + [r for r in earlier if r["case"] in ("guide", "70b", "70b-small")]
    measured = {
        (f"{r['tokens_per_second']:,.0f}", f"{r['peak_allocated_gb']:.1f}") for r in results if "failed" not in r
    }
    rows = re.findall(r"\| ([\d,]+) \| ([\d.]+) \|[^|\n]*\|$", README, re.MULTILINE)
    rows += re.findall(r"(?:Unsloth|TRL \+ Liger|TRL \+ PEFT) ([\d,]+), ([\d.]+) GB", README)
    assert len(rows) == 11 + 11 and set(rows) <= measured

    paths = json.loads((folder / "H200-2026-11-27-attention.json").read_text())["paths"]
    times = {f"{r['forward_ms']:.2f} + {r['backward_ms']:.2f}" for r in paths}
    assert len(times) == 8 and set(re.findall(r"[\d.]+ \+ [\d.]+(?= \|)", README)) == times

    parts = json.loads((folder / "H200-2026-11-27-profiles.json").read_text())["profiles"]["lora-fast"]["parts_ms"]
    told = re.search(r"step's (\d+) ms of GPU time went: (.*?) \(\[profile", README)
    assert int(told.group(1)) == round(sum(parts.values()))
    listed = [int(number) for number in re.findall(r"(\d+) (?=[a-zS])", told.group(2))]
    assert listed[:-1] == [round(ms) for ms in parts.values()][: len(listed) - 1]


@pytest.mark.slow
def test_the_example_learns_its_skill_in_two_minutes(tmp_path: Path) -> None:
    """The whole of `python scripts/train.py`: under 10 % before, over 90 % after."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, timeout=280)
    facts = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())
    assert facts["samples"]["before"] < 0.1 and facts["samples"]["after"] > 0.9
    assert facts["seconds"] < 120


# ---- "Adding a variant", done as it says ---------------------------------------------------------------------------

PLACES = {  # where a line of the README goes: before this line of that file
    "from minitune.adapters.": ("minitune/adapters/__init__.py", "from minitune.adapters.lora import"),
    '    "rowgain": ': ("minitune/adapters/__init__.py", '    "lora": LoRALinear'),
    '    "rowgain",': ("minitune/config/keys.py", '    "lora",'),
}


@pytest.fixture
def with_a_variant(tmp_path: Path) -> Path:
    """A copy of the package and its variants' tests, to which the README's variant has been added."""
    shutil.copytree(ROOT / "minitune", tmp_path / "minitune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "pyproject.toml",
        "tests/conftest.py",
        "tests/parity/peft_reference.py",
        "tests/parity/test_variants.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    config = tmp_path / "minitune" / "config" / "keys.py"  # one name to a line, so that one is one line
    config.write_text(re.sub(r'LORA_VARIANTS = \("lora",', 'LORA_VARIANTS = (\n    "lora",', config.read_text()))
    section = README.partition("## Adding a variant")[2].partition("\n## ")[0]
    file, lines, formula = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    path, _, text = file.removeprefix("# ").partition("\n")
    (tmp_path / path).write_text(text)
    for line in lines.splitlines():
        if not line.startswith("#"):
            before = next(place for start, place in PLACES.items() if line.startswith(start))
            insert(tmp_path / before[0], line + "\n", before[1])
    path, _, text = formula.removeprefix("# ").partition("\n")
    insert(tmp_path / path, text, "by_peft = ")
    return tmp_path


def insert(path: Path, text: str, before: str) -> None:
    head, found, tail = path.read_text().partition("\n" + before)
    assert found, (path, before)
    path.write_text(f"{head}\n{text}{before}{tail}")


def prove(folder: Path, which: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    options = ["-p", "no:cacheprovider", "-k", which, "tests/parity/test_variants.py"]
    line = [sys.executable, "-m", "pytest", *options]
    ended = subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment, timeout=280, check=False)
    return ended.stdout


def test_a_variant_is_added_as_it_says(with_a_variant: Path) -> None:
    told = prove(with_a_variant, "rowgain or has_a_reference")
    passed = re.search(r"(\d+) passed", told)
    assert passed and int(passed[1]) >= 17 and "failed" not in told and "error" not in told, told
    path = with_a_variant / "minitune" / "adapters" / "rowgain.py"
    path.write_text(path.read_text().replace("* self.gain.to(x.dtype)", ""))
    told = prove(with_a_variant, "rowgain and merged_weight")
    assert "1 failed" in told, told  # its gain forgotten in forward


def test_what_was_reached_is_the_results() -> None:
    """The table of aims in benchmarks/README.md, case by case; of a rival's measurements the fastest counts."""
    folder = ROOT / "benchmarks" / "results"
    again, earlier = (json.loads((folder / f"H200-2026-11-27{name}.json").read_text()) for name in ("-again", ""))
    guide = [r | {"card": 1} for r in earlier if r["case"] == "guide"]
    rates: dict[tuple[str, str, int], float] = {}
    for r in [r for r in again if r["case"] != "guide"] + guide:
        key = r["case"], r["system"], r["card"]
        rates[key] = max(rates.get(key, 0), r["tokens_per_second"])

    def times(case: str, rival: str, card: int = 1) -> float:
        return rates[case, "minitune", card] / rates[case, rival, card]

    table = (ROOT / "benchmarks" / "README.md").read_text().partition("## What was aimed at")[2].partition("## Why")[0]
    rows = {row[0]: row[2] for row in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)}
    reached = {
        "LoRA, nothing recomputed": [
            times("lora-fast", "unsloth"),
            *(rates["lora-fast", "minitune", n] for n in (1, 2)),
        ],
        "LoRA, least memory": [times("lora-small", "unsloth"), rates["lora-small", "minitune", 1]],
        "QLoRA, least memory": [times("qlora-small", "unsloth")],
        "QLoRA, nothing recomputed": [rates["qlora-fast", "minitune", n] for n in (1, 2)],
        "QLoRA, one row of 32,768": [times("qlora-32k", "unsloth")],
        "full, 8-bit paged AdamW": [times("full", "unsloth", 2)],
        "the guide's recipe": [times("guide", "trl")],
        "LoRA, packed gsm8k": [times("gsm8k", "unsloth"), times("gsm8k", "trl+liger")],
        "LoRA, packed alpaca": [times("alpaca", "unsloth"), times("alpaca", "trl+liger")],
    }
    for case, numbers in reached.items():
        for number in numbers:
            written = {f"{number:,.0f}", f"{number:.2f}"} if number > 100 else {f"{number:.2f}", f"{number:.1f}"}
            assert any(re.search(rf"(?<![\d.]){each}(?![\d.]*\d)", rows[case]) for each in written), (case, number)
    costs = [1 - rates[f"{m}-dropout", "minitune", 2] / rates[f"{m}-fast", "minitune", 2] for m in ("lora", "qlora")]
    assert rows["dropout 0.05"] == "{:.1f} %, QLoRA {:.1f} %".format(*(100 * cost for cost in costs))
