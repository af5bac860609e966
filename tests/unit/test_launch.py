"""Which process this is, and launches that are refused with what to do."""

import pytest

from minitune import launch
from minitune.errors import UserError
from minitune.launch import Place

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *launch.COPIES.values()):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.place() == Place(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")  # as some schedulers set it
    assert launch.place() == Place(0, 1, 0, 1)


def test_torchrun_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launch.place() == Place(rank=5, world=8, local_rank=1, local_world=4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE but no RANK"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        (TORCHRUN | {"RANK": "8"}, "do not go together"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "x"}, "must be whole numbers"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
    ],
)
def test_half_a_launch_is_refused(changes: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        launch.place()


def test_each_process_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"8 processes were started on a machine with 4 GPUs.*--nproc-per-node 4"):
        launch.check(Place(0, 8, 0, 8), gpus=4)
    launch.check(Place(0, 8, 0, 8), gpus=8)
    launch.check(Place(0, 8, 0, 8), gpus=0)
