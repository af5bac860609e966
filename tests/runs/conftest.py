"""Small real runs: a random Llama with the built-in tokenizer, a handful of rows, a few steps on the CPU."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitune import shards
from minitune.config import load_config
from minitune.model import Llama
from minitune.pretrained import TINY, read_config
from minitune.train import train

Start = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama under the built-in tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    like = folder / "like"
    shutil.copytree(TINY, like)
    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (like / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(read_config(like))
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(p.shape) if name.endswith("norm.weight") else torch.randn(p.shape, generator=draw) * 0.05
        for name, p in model.named_parameters()
    }
    shards.save(folder / "model", tensors.items(), like=like)
    return folder / "model"


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty Alpaca rows of unequal lengths."""
    draw = random.Random(0)
    words = ["red", "blue", "green", "lamp", "chair", "table", "order", "send", "please", "Alice", "Paris", "Friday"]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(60):
            row = {
                "instruction": f"Repeat number {i}.",
                "input": " ".join(draw.choices(words, k=draw.randint(0, 9))),
                "output": " ".join(draw.choices(words, k=draw.randint(1, 12))),
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def start(tmp_path: Path, small_base: Path, rows_file: Path) -> Start:
    """start("name", "key=value", ...) runs a small recipe in tmp_path/name; returns the folder and run.json's facts."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        method = "lora"
        seed = 3
        [model]
        path = "{small_base}"
        dtype = "float32"
        [data]
        train = ["{rows_file}"]
        max_seq_len = 128
        [lora]
        r = 4
        alpha = 12
        dropout = 0.1
        [optim]
        learning_rate = 5e-3
        [train]
        num_epochs = 3
        batch_size = 2
        gradient_accumulation_steps = 3
        [eval]
        every_steps = 3
        early_stopping_patience = 0
        [save]
        every_steps = 2
        [log]
        every_steps = 1
        tensorboard = false
        """
    )

    def go(name: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
        out = tmp_path / name
        return out, train(load_config([str(recipe), f"out={out}", *overrides]))

    return go


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
