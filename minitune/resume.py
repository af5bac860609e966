"""From a checkpoint on: the newest valid one put back into model, optimizer and data stream, or the best one's weights.

What a file system says is whole (`checkpoint.damaged`) is held to the model, the optimizer and the run as well, before
any of them is touched.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitune import checkpoint, optim, parallel, sharding
from minitune.checkpoint import Damaged
from minitune.data.stream import Stream
from minitune.errors import RunFailed
from minitune.identity import check_identity, differing, told
from minitune.progress import Progress


def resume(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Stream,
    expected: dict[str, Any],
    say: Callable[[str], None],
) -> Progress | None:
    """Put the newest valid checkpoint of a run back into model, optimizer and data stream; how far it had come, or
    None if there is none. A damaged one is set aside by name and the one before taken.

    Raises:
        UserError: the checkpoint belongs to a run whose identity differs from `expected`.
    """
    progress: Progress | None = None

    def newest() -> str | None:
        nonlocal progress
        for path in reversed(checkpoint.checkpoints(run)):
            try:
                progress = load(path, model, optimizer, stream, expected)
            except (Damaged, RecursionError) as damage:  # JSON that somebody has nested too deeply
                aside = checkpoint.set_aside(path)
                say(f"checkpoint {path.name} is damaged ({damage}); set aside as {aside.name}")
            else:
                say(f"going on from {path.name}")
                return path.name
        return None

    found = parallel.of_first(newest)
    if found is not None and progress is None:  # the first process has found it
        try:
            progress = load(run / "checkpoints" / found, model, optimizer, stream, expected)
        except Damaged as damage:
            raise RunFailed(f"{found} is whole to the first process, and to this one damaged ({damage})") from None
    return progress


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, stream: Stream, expected: dict[str, Any]
) -> Progress:
    """Put a checkpoint back into model, optimizer and data stream; if it is no good (Damaged) into none of them."""
    if (damage := checkpoint.damaged(path)) is not None:
        raise Damaged(damage)
    state = checkpoint.read_state(path)
    check_identity(path, state["identity"], expected)
    try:
        progress = Progress.read(state["progress"])
    except ValueError as error:
        raise Damaged(str(error)) from None
    if not state["step"] == progress.step == checkpoint.step_of(path):
        raise Damaged(f"it says it is of step {told(state['step'])}")
    if progress.stream != stream.state_at(progress.step):
        raise Damaged("its place in the data is not that of its step")
    trained = read_trained(path, model)
    moments, numbers = own(model, checkpoint.read_tensors(path / "optimizer.safetensors")), state["optimizer"]
    checkpoint.check_numbers(moments)
    counted = {progress.applied} if progress.applied else optim.updates(moments, numbers) & {0}
    if optim.updates(moments, numbers) != counted:
        raise Damaged(f"its optimizer state is not that of {progress.applied} updates")
    try:
        optim.load_state(model, optimizer, moments, numbers)
    except ValueError as error:
        raise Damaged(str(error)) from None
    put(trained, model)
    stream.load(progress.stream)
    return progress


def load_trained(path: Path, model: nn.Module) -> None:
    """Only the trained parameters of a checkpoint, e.g. of the best one at the end of a run. Raises Damaged."""
    if (damage := checkpoint.damaged(path)) is not None:
        raise Damaged(damage)
    put(read_trained(path, model), model)


def unfit(path: Path, model: nn.Module, run_is: dict[str, Any]) -> str | None:
    """Why the trained parameters of a checkpoint are not those of this run at its step, or None."""
    if (damage := checkpoint.damaged(path)) is not None:
        return damage
    state = checkpoint.read_state(path)
    if differing(state["identity"], run_is):
        return "it is of another run"
    if state["step"] != checkpoint.step_of(path):
        return f"it says it is of step {told(state['step'])}"
    try:
        read_trained(path, model)
    except Damaged as damage:
        return str(damage)
    return None


def read_trained(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, which fit the model."""
    saved = own(model, checkpoint.read_tensors(path / "trained.safetensors"))
    trained = optim.trained_parameters(model)
    if saved.keys() != trained.keys():
        raise Damaged(f"it trains other parameters: {', '.join(sorted(saved.keys() ^ trained.keys())[:5])}")
    for name, parameter in trained.items():
        if optim.kind_of(saved[name]) != optim.kind_of(parameter):
            raise Damaged(f"{name} is {saved[name].dtype} {tuple(saved[name].shape)} in it")
    checkpoint.check_numbers(saved)
    return saved


@torch.no_grad()
def put(saved: dict[str, Tensor], model: nn.Module) -> None:
    for name, parameter in optim.trained_parameters(model).items():
        parameter.copy_(saved[name])


def own(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that are spread over ranks, the rows that are here."""
    try:
        return sharding.parts(model, tensors)
    except ValueError as error:
        raise Damaged(str(error)) from None
