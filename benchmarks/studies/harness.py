"""One harness for the studies: arms that differ in a few keys, each at its own learning rate, over several seeds.

    python benchmarks/studies/rank.py --folder FOLDER --data DATA     # DATA: a folder with the real data
    python benchmarks/studies/rank.py --folder FOLDER                 # the built-in data alone
    python benchmarks/studies/rank.py --folder FOLDER --small         # seconds: proves that it runs, and nothing else

A study trains the built-in 2M-parameter model by `minitune.train.train`, on a CPU. What makes its comparisons fair:

- every arm gets the same rows in the same number of steps;
- an arm's learning rate is searched for that arm: from where it begins by factors of the root of ten, and on, until
  the best has a worse one on either side. The search sees one seed, and rows (`tune`) of its own;
- what is reported is the loss on other rows (`test`), over seeds that the search has not used.

A run that is done is remembered in FOLDER/runs.jsonl by its recipe and its rows, so a study that was cut goes on where
it was. NAME.json and NAME.svg go to `--out`, with the versions and the command that they come from.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from figure import Figure, draw

from minitune import files
from minitune.config import load_config
from minitune.errors import RunFailed
from minitune.log import versions
from minitune.pretrained import TINY
from minitune.train import train

HERE = Path(__file__).parent
RECIPE = {
    "model": {"path": "tiny", "dtype": "float32"},
    "data": {"max_seq_len": 512, "checks": "warn", "near_duplicates": "off"},
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "optim": {"max_grad_norm": 1.0, "warmup_ratio": 0.05, "weight_decay": 0.0},
    "train": {"batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 40},
    "eval": {"every_steps": 0},
    "save": {"every_steps": 0},
    "log": {"every_steps": 10_000, "tensorboard": False},
}
FACTOR = 10**0.5  # between two learning rates of a search
WIDEST = 6  # learning rates that a search tries
Keys = dict[str, Any]  # of a recipe, as key.path -> value


@dataclass(frozen=True)
class Task:
    """Rows to learn from, to choose learning rates by, and to report on: no row is in two of them."""

    name: str
    words: str
    train: Path
    tune: Path
    test: Path
    columns: dict[str, str]
    steps: int  # of training
    prompts: int = 0  # of `test`, answered after training and held to the right answer, letter by letter

    def first(self, rows: int) -> Path:
        """A file of the first rows to learn from."""
        path = self.train.with_name(f"{self.name}-train-{rows}.jsonl")
        path.write_text("".join(self.train.read_text().splitlines(keepends=True)[:rows]))
        return path


@dataclass
class Measured:
    """An arm on a task."""

    task: str
    arm: str
    keys: Keys
    learning_rate: float
    losses: list[float]  # on `test`, nats a token, one a seed
    exact: list[float]  # share of the prompts answered exactly, one a seed; [] where none were asked
    tried: dict[str, float] = field(default_factory=dict)  # learning rate -> loss on `tune`

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


class Bench:
    """Trains what a study asks for, each run once."""

    def __init__(self, folder: Path, data: Path | None, small: bool) -> None:
        self.folder, self.small = folder.resolve(), small
        self.seeds = (1, 2) if small else (1, 2, 3, 4, 5)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.memory = self.folder / "runs.jsonl"
        lines = self.memory.read_text().splitlines() if self.memory.exists() else []
        self.known: dict[str, Keys] = {run["digest"]: run for run in map(json.loads, lines)}
        self.used: dict[str, float] = {}  # digest -> seconds, of the runs that this study rests on
        self.tasks = {"orders": self.orders()}
        if data is not None:
            self.tasks["gsm8k"] = self.gsm8k(data)

    def orders(self) -> Task:
        rows = (TINY / "train.jsonl").read_text().splitlines()
        return self.task("orders", "the built-in orders", rows[:1600], rows[1600:], {}, 16, prompts=40)

    def gsm8k(self, data: Path) -> Task:
        learned, other = ((data / f"gsm8k_{part}.jsonl").read_text().splitlines() for part in ("train", "test"))
        columns = {"question": "instruction", "answer": "output"}
        return self.task("gsm8k", "GSM8K's word problems", learned[:1600], other, columns, 40)

    def task(
        self,
        name: str,
        words: str,
        learned: list[str],
        other: list[str],
        columns: dict[str, str],
        steps: int,
        prompts: int = 0,
    ) -> Task:
        """Its rows as files in the folder."""
        few = 6 if self.small else 48
        parts = {"train": learned, "tune": other[:few], "test": other[few : 2 * few]}
        paths = {part: self.folder / f"{name}-{part}.jsonl" for part in parts}
        for part, rows in parts.items():
            paths[part].write_text("".join(f"{row}\n" for row in rows))
        steps, prompts = (1, 0) if self.small else (steps, prompts)
        return Task(name, words, **paths, columns=columns, steps=steps, prompts=prompts)

    def measure(self, task: Task, arm: str, keys: Keys, learning_rate: float) -> Measured:
        """An arm at the learning rate that suits it; the search begins at `learning_rate`."""
        tried = {} if self.small else self.search(task, keys, learning_rate)
        best = min(tried, key=tried.get, default=learning_rate)
        return self.repeat(task, arm, keys, best, {f"{rate:.3g}": loss for rate, loss in sorted(tried.items())})

    def search(self, task: Task, keys: Keys, start: float) -> dict[float, float]:
        """Learning rate -> loss on `tune`, with the best between two that are worse (or WIDEST tried)."""

        def loss(power: int) -> float:
            rates[power] = float(f"{start * FACTOR**power:.3g}")
            return self.run(task.tune, task, keys | {"optim.learning_rate": rates[power]}, seed=0)["loss"]

        rates: dict[int, float] = {}
        found = {power: loss(power) for power in (0, -1, 1)}
        while len(found) < WIDEST:
            best = min(found, key=found.get)
            if min(found) < best < max(found):
                break
            outside = best - 1 if best == min(found) else best + 1
            found[outside] = loss(outside)
        return {rates[power]: found[power] for power in found}

    def repeat(
        self, task: Task, arm: str, keys: Keys, learning_rate: float, tried: dict[str, float] | None = None
    ) -> Measured:
        """An arm at one learning rate, over the seeds."""
        whole = keys | {"optim.learning_rate": learning_rate}
        runs = [self.run(task.test, task, whole | {"eval.samples": task.prompts}, seed) for seed in self.seeds]
        found = Measured(task.name, arm, keys, learning_rate, [run["loss"] for run in runs], [], tried or {})
        found.exact = [run["exact"] for run in runs if run["exact"] is not None]
        say(f"  {task.name}, {arm}: {found.mean:.4f} +- {found.spread:.4f} at {learning_rate:.3g}")
        return found

    def untrained(self, task: Task) -> float:
        """The loss of the model as it is on `test`: after one step too small to change anything."""
        keys = {"method": "lora", "optim.learning_rate": 1e-12, "train.max_steps": 1}
        return self.run(task.test, task, keys, seed=0)["loss"]

    def run(self, rows: Path, task: Task, keys: Keys, seed: int) -> Keys:
        """Train once and evaluate on `rows`: the loss, and the share of prompts answered exactly."""
        keys = {"train.max_steps": task.steps, "data.columns": task.columns, **keys, "seed": seed}
        learned = Path(keys.pop("data.train", task.train))
        recipe = with_keys(RECIPE, keys)
        facts = [recipe, files.sha256(learned), files.sha256(rows), versions().get("minitune"), versions()["torch"]]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if digest not in self.known:
            self.known[digest] = {"digest": digest} | self.train(recipe, learned, rows)
            with open(self.memory, "a") as file:
                file.write(json.dumps(self.known[digest]) + "\n")
        self.used[digest] = self.known[digest]["seconds"]
        return self.known[digest]

    def train(self, recipe: Keys, learned: Path, rows: Path) -> Keys:
        out, path, since = self.folder / "run", self.folder / "recipe.toml", time.perf_counter()
        shutil.rmtree(out, ignore_errors=True)
        places = {"out": str(out), "data.train": [str(learned)], "data.eval": [str(rows)], "data.eval_fraction": 0.0}
        path.write_text(tomli_w.dumps(with_keys(recipe, places | {"data.cache": str(self.folder / "cache")})))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                facts = train(load_config([str(path)]))
        except RunFailed:  # too large a learning rate: no loss is worse
            facts = {"best_eval_loss": math.inf}
        return {
            "loss": facts["best_eval_loss"],
            "exact": facts.get("samples", {}).get("after"),
            "seconds": round(time.perf_counter() - since, 2),
        }


def with_keys(recipe: Keys, keys: Keys) -> Keys:
    """A recipe's tables with some keys set."""
    tables = {name: dict(table) if isinstance(table, dict) else table for name, table in recipe.items()}
    for key, value in keys.items():
        section, dot, name = key.rpartition(".")
        (tables.setdefault(section, {}) if dot else tables)[name] = value
    return tables


@dataclass(frozen=True)
class Finding:
    """What a study comes to."""

    question: str
    sentence: str  # what it shows, and what it does not
    arms: list[Measured]
    figure: Figure
    more: Keys = field(default_factory=dict)


def main(name: str, study: Callable[[Bench], Finding]) -> None:
    """Run a study from the command line, and write down what it finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for runs, and what is remembered of them")
    parser.add_argument("--data", type=Path, help="a folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--small", action="store_true", help="two steps, few arms: a test of the harness")
    options = parser.parse_args()
    torch.set_num_threads(1)  # at this size more only wait for each other
    random.seed(0)
    say(f"{name}:")
    bench = Bench(options.folder, options.data, options.small)
    finding = study(bench)
    options.out.mkdir(parents=True, exist_ok=True)
    told = {
        "study": name,
        "question": finding.question,
        "sentence": finding.sentence,
        "model": "tiny (built in)",
        "tasks": {task.name: {"rows": task.words, "steps": task.steps} for task in bench.tasks.values()},
        "seeds": list(bench.seeds),
        **finding.more,
        "arms": [asdict(arm) | {"mean": arm.mean, "spread": arm.spread} for arm in finding.arms],
        "runs": len(bench.used),
        "seconds": round(sum(bench.used.values())),  # of all runs, those that another study had done included
        "versions": versions(),
        "command": " ".join(["python", f"benchmarks/studies/{name}.py", *asked(options)]),
    }
    nowhere = json.loads(json.dumps(told).replace(str(bench.folder), "FOLDER"))  # results name no path of a machine
    files.write_json(options.out / f"{name}.json", nowhere)
    files.write_text(options.out / f"{name}.svg", draw(finding.figure))
    say(finding.sentence)


def asked(options: argparse.Namespace) -> list[str]:
    """The command line without the paths of this machine."""
    return ["--folder FOLDER", *["--data DATA"] * (options.data is not None), *["--small"] * options.small]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
