"""What the processes of a job do. Imported by each of them, so neither transformers nor peft nor pytest is here."""

import faulthandler
import os
import signal
import sys
import time
from typing import Any

import torch

from minitune import errors
from minitune import train as training
from minitune.config import load_config


def run_in_place(
    rank: int, world: int, machine: int, port: int, log: str, job: Any, arguments: tuple[Any, ...]
) -> None:
    """One process of a job, as torchrun would have started it; `machine` processes share a machine."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(out), "w", buffering=1) for _ in range(2))
    faulthandler.enable(sys.stderr)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank % machine), "LOCAL_WORLD_SIZE": str(machine)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    job(*arguments)


def train(arguments: list[str], trouble: dict[str, Any] | None = None) -> None:
    """A run of scripts/train.py. `trouble`: what befalls which `rank` before which `step`."""
    if trouble:
        befall(**trouble)
    sys.argv = ["train.py", *arguments]
    errors.run(lambda given: training.train(load_config(given)))


def befall(rank: int, step: int, what: str) -> None:
    """Let one rank meet its trouble at the beginning of a step."""
    take_step = training.take_step

    def troubled(model: Any, optimizer: Any, batches: Any, cfg: Any, number: int) -> Any:
        if number == step and int(os.environ["RANK"]) == rank:
            match what:
                case "raises":
                    raise ValueError("a mistake on one rank")
                case "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "is stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hangs":
                    time.sleep(1000)
                case "gets SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
        return take_step(model, optimizer, batches, cfg, number)

    training.take_step = troubled
