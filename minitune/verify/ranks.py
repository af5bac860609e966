"""A step that two processes share, over gloo on the CPU, against the same step in one.

Run as `python -m minitune.verify.ranks RECIPE ADAPTER OUT` by each of the two, placed as torchrun would place it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import minitune
from minitune import errors, files, parallel
from minitune.config import Config, dump, load_config
from minitune.verify import given, small
from minitune.verify.table import worst

CPU = torch.device("cpu")
WORLD = 2
LIMIT = 180  # seconds
WAYS = [("lora", "replicate"), ("lora", "full"), ("qlora", "full")]


class Job:
    """Two processes that take all WAYS one after the other, started when the first of them is asked for."""

    def __init__(self, cfg: Config, spec: str, folder: Path) -> None:
        self.cfg, self.spec, self.out = cfg, spec, folder / "ranks"
        self.log: str | None = None

    def gradients_apart(self, method: str, sharding: str) -> tuple[float, str]:
        if self.log is None:
            self.log = self.run()
        path = self.out / f"{method}-{sharding}.safetensors"
        assert path.exists(), self.log
        cfg = replace(self.cfg, method=method)
        model = small.built(cfg, CPU)
        alone = small.step_gradients(model, cfg, small.step_batches(model.config.vocab_size, 4, CPU))
        return worst(load_file(path), alone)

    def run(self) -> str:
        """Start both, wait for them, and return the last line of what they said."""
        self.out.mkdir()
        recipe = self.out / "recipe.toml"  # the variant goes beside it: no recipe can name code
        files.write_bytes(recipe, dump(replace(self.cfg, lora=replace(self.cfg.lora, variant="lora"))).encode())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "minitune.verify.ranks", str(recipe), self.spec, str(self.out)]
        processes, logs = [], [self.out / f"rank-{rank}.log" for rank in range(WORLD)]
        try:
            for rank, log in enumerate(logs):
                with open(log, "w") as said:
                    processes.append(subprocess.Popen(command, stdout=said, stderr=said, env=place(rank, port)))
            until = time.monotonic() + LIMIT
            for process in processes:
                process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"the processes did not end within {LIMIT} s"
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"exit codes {[process.returncode for process in processes]}"


def place(rank: int, port: int) -> dict[str, str]:
    """The environment of one of the processes, in which it finds this package and no GPU."""
    said = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    paths = [str(Path(minitune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return (
        os.environ
        | {name: str(value) for name, value in said.items()}
        | {
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "CUDA_VISIBLE_DEVICES": "",
        }
    )


def main(arguments: list[str]) -> None:
    recipe, spec, out = arguments
    torch.set_num_threads(1)
    cfg = load_config([recipe])
    with given.variant(spec) as name, parallel.processes(False, LIMIT / 2) as device:
        for method, how in WAYS:
            found = shared_step(replace(cfg, lora=replace(cfg.lora, variant=name)), method, how, device)
            if parallel.is_first():
                files.write_tensors(Path(out) / f"{method}-{how}.safetensors", found)


def shared_step(cfg: Config, method: str, how: str, device: torch.device) -> dict[str, Tensor]:
    """Every gradient of a step of which this process takes its part."""
    cfg = replace(cfg, method=method, parallel=replace(cfg.parallel, sharding=how))
    model = small.built(cfg, device)
    batches = small.step_batches(model.config.vocab_size, 2, device, parallel.rank(), parallel.world())
    return small.step_gradients(model, cfg, batches)  # adapters are whole on every rank


if __name__ == "__main__":
    errors.run(main)
