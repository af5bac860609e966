"""A model spread over two GPUs comes to the numbers of one that each has whole, over NCCL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed"),
]

HERE = Path(__file__).parent
KEYS = ["model.dtype=float32", "train.max_steps=4", "train.batch_size=1", "train.gradient_accumulation_steps=2"]
KEYS += ["train.compile=none", "eval.samples=8", "log.every_steps=1", "log.tensorboard=false"]


SHAPES = [
    ["method=lora", "lora.dropout=0"],
    ["method=qlora", "lora.dropout=0"],
    ["method=full"],
    ["method=lora", "lora.dropout=0", "lora.layers_to_transform=[1]"],  # gathered backwards in part alone
    ["method=qlora", "lora.dropout=0", 'lora.modules_to_save=["norm"]'],
]


def curve(program: Path, shape: list[str], sharding: str, out: Path) -> torch.Tensor:
    """(steps, 2): losses and gradient norms."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    command += [*shape, *KEYS, f"parallel.sharding={sharding}", f"out={out}"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines if "loss" in line])


@pytest.mark.parametrize("program", ["behind.py", "../../scripts/train.py"])
@pytest.mark.parametrize("shape", SHAPES, ids=" ".join)
def test_spread_is_whole(shape: list[str], program: str, tmp_path: Path) -> None:
    """Two micro-batches a step after evaluations and answers: where a unit gathered in vain has made wrong weights."""
    whole = curve(HERE / program, shape, "replicate", tmp_path / "whole")
    spread = curve(HERE / program, shape, "full", tmp_path / "spread")
    assert len(whole) == 4
    torch.testing.assert_close(spread, whole, rtol=2e-5, atol=0)
