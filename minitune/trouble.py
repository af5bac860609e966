"""What goes wrong while a run is under way through no fault of the input, told in one sentence with what to do."""

import errno
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from minitune.config import Config
from minitune.errors import RunFailed
from minitune.secrets import shortened


@contextmanager
def told(cfg: Config) -> Iterator[None]:
    """Within the block, trouble becomes RunFailed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(out_of_memory(cfg, str(error))) from None
    except MemoryError:
        raise RunFailed(out_of_memory(cfg, "the host has no memory left", host=True)) from None
    except BrokenExecutor:
        raise RunFailed(
            "a worker process that reads data died; the system may have ended it for want of memory. Run again to go on"
        ) from None
    except OSError as error:
        raise RunFailed(disk_trouble(cfg, error)) from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise RunFailed(out_of_memory(cfg, str(error))) from None


def out_of_memory(cfg: Config, said: str, host: bool = False) -> str:
    """Which knobs are left to turn: those that the run can go on with, and those that ask for a new start."""
    drops = cfg.method != "full" and cfg.lora.dropout > 0
    all_again = cfg.train.gradient_checkpointing == "auto" and cfg.train.offload in ("always", "inputs")
    smaller = (
        "train.batch_size=1 train.gradient_accumulation_steps="
        f"{cfg.train.batch_size * cfg.train.gradient_accumulation_steps}"
    )
    go_on = {
        "train.offload=never": host and cfg.train.offload != "never",
        "train.gradient_checkpointing=full": cfg.train.gradient_checkpointing != "full" and not all_again,
        "train.offload=inputs": not host and cfg.train.offload != "inputs",
        "model.dense_weights=never": cfg.method == "qlora" and cfg.model.dense_weights != "never",
        smaller: cfg.train.batch_size > 1 and not drops,  # dropout is drawn by micro-batch
    }
    anew = {
        smaller: cfg.train.batch_size > 1 and drops,
        "optim.name=paged_adamw_8bit": cfg.optim.name != "paged_adamw_8bit",
        "method=qlora": cfg.method != "qlora",
        f"data.max_seq_len below {cfg.data.max_seq_len}": True,
    }
    first, then = (", ".join(knob for knob, left in knobs.items() if left) for knobs in (go_on, anew))
    why = shortened(said.strip().splitlines()[0], 200)
    return (
        f"out of memory ({why}); the checkpoints in {checkpoints(cfg)} are whole. "
        + (f"Run again to go on with {first}; or " if first else "It helps to ")
        + f"start anew with {then}"
    )


def disk_trouble(cfg: Config, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    where = f" at {error.filename}" if error.filename else ""
    return (
        f"{error.strerror or error}{where}; the checkpoints in {checkpoints(cfg)} are whole. "
        f"{'Make room' if full else 'Look at that file or its disk'}, then run again to go on"
    )


def checkpoints(cfg: Config) -> Path:
    return Path(cfg.out) / "checkpoints"
