"""What all injections share: a 1-layer model, a few rows, a recipe, and the runs that nothing happened to."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import torch
from forked import Ended, Plant, Run
from outcome import Outcome, outcome, valid
from points import before_call, count_points, die

from minitune import shards, train
from minitune.model import Llama
from minitune.pretrained import TINY, read_config

METHODS = ("lora", "qlora", "full")
STEPS = 12

RECIPE = """
seed = 3
[model]
path = "{base}"
dtype = "float32"
[data]
train = ["{rows}"]
cache = "{cache}"
eval_fraction = 0.2
max_seq_len = 80
[lora]
r = 4
alpha = 12
dropout = 0.1
[optim]
learning_rate = 2e-2
[train]
max_steps = {steps}
batch_size = 2
gradient_accumulation_steps = 2
deterministic = true
[eval]
every_steps = 3
early_stopping_patience = 0
[save]
every_steps = 2
keep_last = 3
[log]
every_steps = 1
tensorboard = false
"""


@dataclass
class World:
    """A folder with the recipe, and what is known, by method, of a run that nothing happens to."""

    folder: Path
    straight: dict[str, Outcome]
    seconds: dict[str, float]
    points: dict[str, list[str]]  # every change of its files, see points.py: "name path", the path in its folder
    stopped: dict[str, Path]  # a run killed after its ninth step, with checkpoints to go on from

    def arguments(self, run: Path, method: str, *overrides: str) -> list[str]:
        return [str(self.folder / "recipe.toml"), f"method={method}", f"out={run}", *overrides]

    def start(self, run: Path, method: str, *plants: Plant, overrides: tuple[str, ...] = ()) -> Run:
        """Start a run in the folder `run`; its output is kept beside it."""
        return forked.start(self.arguments(run, method, *overrides), run.with_name(run.name + ".said"), *plants)

    def run(self, run: Path, method: str, *plants: Plant, overrides: tuple[str, ...] = ()) -> Ended:
        return self.start(run, method, *plants, overrides=overrides).wait()


def make_world(folder: Path) -> World:
    """Make model, rows, recipe and the straight runs: the first as a person starts it, the others forked."""
    make_base(folder / "base")
    make_rows(folder / "rows.jsonl")
    recipe = RECIPE.format(base=folder / "base", rows=folder / "rows.jsonl", cache=folder / "cache", steps=STEPS)
    (folder / "recipe.toml").write_text(recipe)
    world = World(folder, {}, {}, {}, {})
    command = [sys.executable, str(forked.TRAIN), *world.arguments(folder / "cold", "lora")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300, env=os.environ)
    for method in METHODS:
        points = folder / f"{method}.points"
        ended = world.run(folder / method, method, count_points(folder / method, points))
        if ended.code:
            raise RuntimeError(f"the straight {method} run failed: {ended.said()}")
        world.straight[method] = outcome(folder / method)
        world.seconds[method] = ended.seconds
        world.points[method] = points.read_text().splitlines()
        world.stopped[method] = folder / f"{method}-stopped"
        world.run(world.stopped[method], method, before_call(train, "take_step", 10, die))
        if len(valid(world.stopped[method])) < 2:
            raise RuntimeError(f"a {method} run killed after nine steps has checkpoints {valid(world.stopped[method])}")
    if outcome(folder / "cold") != world.straight["lora"]:
        raise RuntimeError("a forked run differs from the same command in a process of its own")
    return world


def make_base(folder: Path) -> None:
    """A random Llama of one layer under the built-in tokenizer."""
    like = folder.with_name("like")
    shutil.copytree(TINY, like)
    config: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 16}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (like / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(read_config(like))
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(p.shape) if name.endswith("norm.weight") else torch.randn(p.shape, generator=draw) * 0.05
        for name, p in model.named_parameters()
    }
    shards.save(folder, tensors.items(), like=like)


def make_rows(path: Path) -> None:
    """Alpaca rows of unequal lengths."""
    draw = random.Random(0)
    words = ["red", "blue", "green", "lamp", "chair", "table", "order", "send", "please", "Alice", "Paris", "Friday"]
    lines = (
        {
            "instruction": f"Repeat number {i}.",
            "input": " ".join(draw.choices(words, k=draw.randint(0, 6))),
            "output": " ".join(draw.choices(words, k=draw.randint(1, 9))),
        }
        for i in range(40)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
