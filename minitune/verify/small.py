"""What is checked on: small random Llamas in a folder, documents of unequal lengths, recipes, and live adapters."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minitune import files, optim, pretrained, seeds, shards
from minitune.build import build_model
from minitune.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    SaveConfig,
    TrainConfig,
)
from minitune.data.corpus import Corpus
from minitune.data.packing import Batch, collate
from minitune.data.stream import deal
from minitune.model import Llama
from minitune.pretrained import TINY
from minitune.step import take_step

R, ALPHA = 5, 12  # alpha / r is neither 1 nor 2, nor alpha / sqrt(r)
SHAPE = {  # grouped queries, a head of its own; widths are multiples of 64 for NF4, and no two of a linear are equal
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": False,
}


def base(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Path:
    """A model folder under the built-in tokenizer; `changes` are to config.json.

    Every weight is random and of a size that matters: a norm of ones would hide that it is put in the wrong place.
    """
    like, made = folder / "like", folder / "model"
    shutil.copytree(TINY, like, ignore=lambda _, names: [name for name in names if not name.endswith(".json")])
    config = json.loads((TINY / "config.json").read_text())
    (like / "config.json").write_text(json.dumps(config | SHAPE | changes))
    with torch.device("meta"):
        model = Llama(pretrained.read_config(like))
    draw = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.rand(shape, generator=draw) + 0.5
        return torch.randn(shape, generator=draw) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    shards.save(made, ((name, drawn(name, p.shape).to(dtype)) for name, p in model.named_parameters()), like=like)
    return made


def rows_file(path: Path) -> Path:
    """Two dozen rows whose answers have from one word to forty."""
    draw = random.Random(0)
    words = ["red", "blue", "green", "lamp", "chair", "table", "order", "send", "please", "Alice", "Paris", "Friday"]
    rows = [
        {"prompt": f"Number {i}: ", "completion": " ".join(draw.choices(words, k=draw.choice([1, 2, 40])))}
        for i in range(24)
    ]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(base: Path, variant: str = "lora", method: str = "lora", dropout: float = 0.0, **train: object) -> Config:
    """A recipe over such a folder at its plainest, fp32; `train` is its section of that name."""
    plain = {"gradient_checkpointing": "none", "offload": "never", "fused": "none", "compile": "none"}
    return Config(
        method=method,
        seed=3,
        model=ModelConfig(path=str(base), dtype="float32", attention="sdpa"),
        data=DataConfig(eval_fraction=0.0, max_seq_len=96, cache="none"),
        lora=LoRAConfig(variant=variant, r=R, alpha=ALPHA, dropout=dropout),
        optim=OptimConfig(max_grad_norm=0.0, learning_rate=2e-3),
        train=TrainConfig(**(plain | train)),
        eval=EvalConfig(every_steps=0, early_stopping_patience=0),
        save=SaveConfig(every_steps=2),
        log=LogConfig(every_steps=1, tensorboard=False),
    )


def in_bf16(cfg: Config) -> Config:
    return replace(cfg, model=replace(cfg.model, dtype="bfloat16", attention="auto"))


def built(cfg: Config, device: torch.device, live: bool = True) -> Llama:
    """The model of a recipe, built as a run builds it; its adapters do something if they are `live`."""
    model = build_model(cfg, Path(cfg.model.path), device)
    return liven(model) if live and cfg.method != "full" else model


@torch.no_grad()
def liven(module: nn.Module, seed: int = 2) -> nn.Module:
    """Move what trains away from where it starts, by a tenth of its size."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            draw = torch.Generator().manual_seed(seeds.derive(seed, name))
            size = parameter.double().square().mean().sqrt().item() or 1.0
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter) * (0.1 * size))
    return module


def corpus(lengths: list[int], vocab: int, seed: int = 0) -> Corpus:
    """Documents of these lengths, of whose tokens some six in ten are to be learned."""
    draw = np.random.default_rng(seed)
    return Corpus.from_documents((draw.integers(3, vocab, n), draw.random(n) < 0.6) for n in lengths)


LENGTHS = [31, 7, 18, 40, 5, 26, 12, 33]  # of the rows of a step: eight, with very unequal loss tokens


def step_batches(vocab: int, size: int, device: torch.device, rank: int = 0, world: int = 1) -> list[Batch]:
    """One step's rows in micro-batches of `size`, those of one rank."""
    documents = corpus(LENGTHS, vocab)
    dealt = deal([[i] for i in range(len(documents))], size, rank, world)
    return [collate(documents, rows, max(LENGTHS), 2).to(device) for rows in dealt]


class Gradients(torch.optim.Optimizer):
    """An optimizer that moves nothing, and keeps the gradients that a step came to."""

    def __init__(self, model: nn.Module) -> None:
        self.named = optim.trained_parameters(model)
        super().__init__(list(self.named.values()), {"lr": 1.0})

    @torch.no_grad()
    def step(self) -> None:
        self.found = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}


def step_gradients(model: Llama, cfg: Config, batches: list[Batch]) -> dict[str, Tensor]:
    """Every gradient of a training step (step.py) over these micro-batches, by name."""
    keeper = Gradients(model)
    take_step(model.train(), keeper, batches, cfg, step=0)
    return keeper.found
