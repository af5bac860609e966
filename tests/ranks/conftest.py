"""Jobs of several processes on this machine, over gloo: forked from one that has PyTorch loaded already."""

import json
import multiprocessing
import random
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from safetensors.torch import load_file

from minitune import shards
from minitune.model import Llama
from minitune.pretrained import TINY, read_config


@dataclass
class Ended:
    """How a job ended."""

    codes: list[int]  # exit code of each rank; -9: it was killed
    logs: list[str]  # what each rank printed
    seconds: float


Launch = Callable[..., Ended]


@pytest.fixture(scope="session")
def forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs", "bitsandbytes", "torch.distributed.fsdp", "torch._dynamo"])
    return context


@pytest.fixture
def launch(forks: Any, tmp_path: Path) -> Launch:
    """launch(ranks, job, *arguments, machines=1, limit=seconds) runs job(*arguments) on each rank. A job that does not
    end in time fails the test, and none outlives it."""
    started: list[Any] = []

    def go(ranks: int, job: Callable[..., None], *arguments: Any, machines: int = 1, limit: float = 120) -> Ended:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [tmp_path / f"rank-{len(started) + rank}.log" for rank in range(ranks)]
        places = [(rank, ranks, ranks // machines, port, str(logs[rank])) for rank in range(ranks)]
        processes = [forks.Process(target=jobs.run_in_place, args=(*p, job, arguments)) for p in places]
        since = time.monotonic()
        for process in processes:
            process.start()
            started.append(process)
        for process in processes:
            process.join(max(0.1, limit - (time.monotonic() - since)))
        seconds = time.monotonic() - since
        told = [log.read_text() if log.exists() else "" for log in logs]
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"after {seconds:.0f} s, exit codes {codes}:\n" + "\n".join(told)
        return Ended(codes, told, seconds)

    yield go
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()


MakeBase = Callable[..., Path]


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """make_base(key of config.json=value, ...) -> the folder of a random Llama under the built-in tokenizer."""

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("base")
        like = folder / "like"
        shutil.copytree(TINY, like)
        config = json.loads((TINY / "config.json").read_text())
        (like / "config.json").write_text(json.dumps(config | changes))
        with torch.device("meta"):
            model = Llama(read_config(like))
        draw = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.rand(p.shape, generator=draw) + 0.5
            if name.endswith("norm.weight")
            else torch.randn(p.shape, generator=draw) * 0.08
            for name, p in model.named_parameters()
        }
        shards.save(folder / "model", tensors.items(), like=like)
        return folder / "model"

    return make


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def base(make_base: MakeBase) -> Path:
    return make_base(**SMALL)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose answers have from one word to forty, so that ranks get very unequal numbers of loss tokens."""
    draw = random.Random(0)
    words = ["red", "blue", "green", "lamp", "chair", "table", "order", "send", "please", "Alice", "Paris", "Friday"]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(45):
            answer = " ".join(draw.choices(words, k=draw.choice([1, 1, 1, 40])))
            file.write(json.dumps({"prompt": f"Number {i}: ", "completion": answer}) + "\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path, base: Path, rows: Path) -> Path:
    """Eight rows a step, whatever shares them; 15 steps in three epochs of 40 rows, the last of each a part."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        method = "lora"
        seed = 3
        [model]
        path = "{base}"
        dtype = "float32"
        [data]
        train = ["{rows}"]
        max_seq_len = 96
        packing = false
        [lora]
        r = 3
        alpha = 4
        dropout = 0.0
        [optim]
        learning_rate = 2e-3
        [train]
        num_epochs = 1
        batch_size = 2
        gradient_accumulation_steps = 4
        [eval]
        every_steps = 2
        early_stopping_patience = 0
        [save]
        every_steps = 2
        [parallel]
        sharding = "replicate"
        timeout_seconds = 60
        [log]
        every_steps = 1
        tensorboard = false
        """
    )
    return path


def curve(run: Path) -> dict[str, list[float]]:
    """What metrics.jsonl says, by key, that should be the same for any number of ranks."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm", "eval_loss", "tokens")}


def made(run: Path) -> dict[str, torch.Tensor]:
    """Every weight that a run handed over."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def shown(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())
