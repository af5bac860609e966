"""NaN and infinities in a loss or a gradient: the step is not applied, and counted; three in a row end the run."""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import mutants
import torch
from forked import Plant
from kills import method_of
from outcome import must_equal, outcome, valid
from points import REAL, before_call, die
from rows import Case, Row, must, must_end_well, must_refuse
from torch import Tensor

from minitune import optim, train

KINDS = [
    (where, value, micro)
    for where in ("loss", "gradient")
    for value in (float("nan"), float("inf"), -float("inf"))
    for micro in (0, -1)
]


def poison_steps(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """One step of a run, or two that are apart; the run is killed after them, and goes on to the same end."""
    method = method_of(case.index)
    where, value, micro = KINDS[case.index % len(KINDS)]
    steps = sorted(case.draw.sample(range(1, 9), k=1 + case.index % 2))
    poison = poisoned(case, steps, where, value, micro)
    must_end_well(case.world.run(case.run, method, *mutant, poison))
    must_be_unmoved(case, len(steps))
    lines = [json.loads(line) for line in (case.run / "metrics.jsonl").read_text().splitlines()]
    must([line["step"] for line in lines if "skipped" in line] == steps, "not told in metrics.jsonl")
    facts = json.loads((case.run / "run.json").read_text())
    must(facts.get("skipped_steps") == len(steps), f"run.json counts {facts.get('skipped_steps')}")

    straight = outcome(case.run)
    case.run.rename(case.folder / "first")
    case.world.run(case.run, method, *mutant, poison, before_call(train, "take_step", 11, die))
    must_end_well(case.world.run(case.run, method, *mutant, poison))
    must_equal(case.run, straight)


def poison_three_in_a_row(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """The run ends with exit 1; its checkpoints are whole, and it goes on from them when the cause is gone."""
    method = method_of(case.index)
    where, value, micro = KINDS[case.index % len(KINDS)]
    first = case.draw.randrange(5, 9)
    steps = [first, first + 1, first + 2]
    ended = case.world.run(case.run, method, *mutant, poisoned(case, steps, where, value, micro))
    must_refuse(ended, (1,))
    must_be_unmoved(case, 3)
    must(valid(case.run), "no checkpoint is left")
    must_end_well(case.world.run(case.run, method, *mutant))


def poisoned(case: Case, steps: list[int], where: str, value: float, micro: int) -> Plant:
    """The plant that spoils micro-batch `micro` of these steps (the first is 1), and leaves word of each whether
    weights and moments are, bit for bit, what they were."""

    def plant() -> None:
        real = train.take_step

        def take_step(model: Any, optimizer: Any, batches: Any, cfg: Any, step: int, *more: Any) -> Any:
            if step + 1 not in steps:
                return real(model, optimizer, batches, cfg, step, *more)
            before = state(model, optimizer)
            clean = spoil(model, where, value, micro % len(batches))
            try:
                return real(model, optimizer, batches, cfg, step, *more)
            finally:
                clean()
                leave_word(case, state(model, optimizer) == before)

        train.take_step = take_step

    return plant


def spoil(model: Any, where: str, value: float, micro: int) -> Callable[[], None]:
    """Add `value` to the loss, or to one number of one gradient, of the micro-th pass; returns how to undo it."""
    calls: list[int] = []

    def spoil_loss(module: Any, inputs: Any, loss: Tensor) -> Tensor:
        calls.append(1)
        return loss + value if len(calls) == micro + 1 else loss

    def spoil_gradient(gradient: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == micro + 1:
            gradient = gradient.clone()
            gradient.view(-1)[gradient.numel() // 2] += value
        return gradient

    if where == "loss":
        return model.register_forward_hook(spoil_loss).remove
    return list(optim.trained_parameters(model).values())[1].register_hook(spoil_gradient).remove


def state(model: Any, optimizer: Any) -> dict[str, bytes]:
    """The bits of all that trains, and of its moments."""
    tensors, numbers = optim.state(model, optimizer)
    found = {name: raw(tensor) for name, tensor in (optim.trained_parameters(model) | tensors).items()}
    return found | {name: str(number).encode() for name, number in numbers.items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def leave_word(case: Case, unmoved: bool) -> None:
    handle = REAL["open"](case.folder / "moved", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    REAL["write"](handle, b"." if unmoved else b"!")
    os.close(handle)


def must_be_unmoved(case: Case, steps: int) -> None:
    told = (case.folder / "moved").read_text()
    must(told == "." * steps, f"weights or moments were changed by {told.count('!')} of {len(told)} poisoned steps")


ROWS = [
    Row("steps with NaN or inf", poison_steps, partial(poison_steps, mutant=(mutants.blind,)), full=20, pr=4),
    Row(
        "three of them in a row",
        poison_three_in_a_row,
        partial(poison_three_in_a_row, mutant=(mutants.blind,)),
        full=8,
        pr=2,
    ),
]
