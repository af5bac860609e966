"""Which of a run's processes this one is, as its launcher says it, and launches that cannot have been meant.

torchrun tells by the environment; so does Ray Train, once its process group is there.
"""

import os
from dataclasses import dataclass

from minitune.errors import UserError

COPIES = {  # launchers that start a program many times, and the variable in which they say how often
    "srun": "SLURM_STEP_NUM_TASKS",
    "mpirun": "OMPI_COMM_WORLD_SIZE",
}
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One process of a run."""

    rank: int = 0
    world: int = 1  # processes in all
    local_rank: int = 0
    local_world: int = 1  # processes on this machine


def place() -> Place:
    """Where this process stands. Raises UserError where the environment tells half of it, or something else."""
    said = [name for name in TORCHRUN if os.environ.get(name)]
    if "RANK" not in said and os.environ.get("WORLD_SIZE", "1") == "1":
        for launcher, count in COPIES.items():
            if os.environ.get(count, "1") != "1":
                raise UserError(
                    f"{launcher} started {os.environ[count]} processes that do not know of each other; let it start "
                    "torchrun, once on each machine (scripts/slurm.sh shows how)"
                )
        return Place()
    if missing := [name for name in TORCHRUN if name not in said]:
        raise UserError(
            f"the environment has {' and '.join(said)} but no {missing[0]}, so it is not torchrun's; start the run "
            "with torchrun --nproc-per-node N scripts/train.py ..., or unset these to train in one process"
        )
    try:
        rank, world, local_rank, local_world = (int(os.environ[name]) for name in TORCHRUN[:4])
    except ValueError:
        raise UserError(f"{', '.join(TORCHRUN[:4])} must be whole numbers; start the run with torchrun") from None
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        raise UserError(
            f"RANK {rank} of WORLD_SIZE {world} and LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_world} do not "
            "go together; start the run with torchrun"
        )
    return Place(rank, world, local_rank, local_world)


def store_outlives_processes() -> bool:
    """Whether the store that the launcher gives is its own, and not the first process'."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def address() -> str:
    """Of the first process' machine."""
    return os.environ["MASTER_ADDR"]


def check(place: Place, gpus: int) -> None:
    """Refuse more processes on a machine than it has GPUs (0: it trains on CPUs)."""
    if gpus and place.local_world > gpus:
        raise UserError(
            f"{place.local_world} processes were started on a machine with {gpus} GPUs, and each needs one of its own; "
            f"start them with torchrun --nproc-per-node {gpus}"
        )
