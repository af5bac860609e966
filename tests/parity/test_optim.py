"""What is optimised and how, clipping against PyTorch's, and a state that goes to disk and comes back exactly."""

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import peft_reference as ref
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import files, optim, pretrained
from minitune.config import LINEARS, OptimConfig
from minitune.model import Llama

CFG = OptimConfig(learning_rate=1e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.base_folder(tmp_path_factory.mktemp("base") / "model", attention_bias=True, tied=True)


def full(base: Path) -> Llama:
    """All parameters train, biases and norms included; the head is the embedding."""
    model = pretrained.load(base)
    model.requires_grad_(True)
    return model


def lora(base: Path) -> Llama:
    return ref.adapted(base, ref.lora_config(*LINEARS))


MODELS = pytest.mark.parametrize("make", [full, lora])


def backward(model: Llama, step: int) -> Tensor:
    tokens = ref.token_rows(2, 15, seed=step)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    loss = model(tokens, labels=labels) / (labels != -100).sum()
    loss.backward()
    return loss.detach()


def take_steps(model: Llama, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optim.set_learning_rate(optimizer, 1e-2 / (step + 1))
        optim.update(model, optimizer, 0.3, backward(model, step))
        optimizer.zero_grad()


def weights(model: Llama) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- groups ---------------------------------------------------------------------------------------------------------


@MODELS
def test_matrices_decay_vectors_do_not_and_nothing_else_is_there(base: Path, make: Callable[[Path], Llama]) -> None:
    model = make(base)
    optimizer, line = optim.make_optimizer(model, CFG)
    assert line == "adamw" and type(optimizer) is torch.optim.AdamW
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    assert decay.keys() == {p for p in model.parameters() if p.requires_grad}
    for name, p in optim.trained_parameters(model).items():
        assert decay[p] == (0.0 if name.endswith(("norm.weight", ".bias")) else 0.1), name
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    assert len(optimizer.param_groups) == (2 if make is full else 1)  # an adapter has matrices alone
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, False)


def test_without_a_gradient_only_the_matrices_shrink(base: Path) -> None:
    model = full(base)
    before = weights(model)
    optimizer, _ = optim.make_optimizer(model, CFG)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        vector = name.endswith(("norm.weight", ".bias"))
        torch.testing.assert_close(p.detach(), before[name] * (1 if vector else 1 - 1e-2 * 0.1))
        assert vector or not torch.equal(p, before[name]), name


@MODELS
def test_a_step_moves_all_that_trains_and_nothing_else(base: Path, make: Callable[[Path], Llama]) -> None:
    model = make(base)
    before = weights(model)
    optimizer, _ = optim.make_optimizer(model, CFG)
    take_steps(model, optimizer, range(1))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is not p.requires_grad, name


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_paged_optimizer_on_the_cpu_is_plain_adamw_and_says_so(base: Path, name: str) -> None:
    model, plain = lora(base), lora(base)
    optimizer, line = optim.make_optimizer(model, OptimConfig(name=name, learning_rate=1e-2, weight_decay=0.1))
    assert type(optimizer) is torch.optim.AdamW
    assert name in line and "CUDA" in line and "plain AdamW" in line
    take_steps(model, optimizer, range(2))
    take_steps(plain, optim.make_optimizer(plain, CFG)[0], range(2))
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(model).items())


# ---- clipping -------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("limit", [1e-3, 0.3, 1e6, 0])
def test_clipping_is_pytorch_s(base: Path, make: Callable[[Path], Llama], limit: float) -> None:
    ours, theirs = make(base), make(base)
    for model in (ours, theirs):
        backward(model, 0)
    untouched = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
    still = torch.optim.SGD(ours.parameters(), lr=0.0)  # so that what is left are the gradients
    norm, finite = optim.update(ours, still, limit, torch.zeros(()))
    assert torch.equal(norm, expected) and norm > 1e-3 and finite
    exact = torch.cat([g.flatten().double() for g in untouched.values()]).norm()
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    theirs_of = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, theirs_of[name].grad if limit else untouched[name]), name
    if limit == 1e-3:
        clipped = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None]).norm()
        assert clipped.item() == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_and_not_applied(base: Path, what: float, where: str) -> None:
    model = lora(base)
    optimizer, _ = optim.make_optimizer(model, CFG)
    take_steps(model, optimizer, range(1))
    before, moments = weights(model), {key: t.clone() for key, t in optim.state(model, optimizer)[0].items()}
    loss = backward(model, 1)
    if where == "gradient":
        next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = what
    else:
        loss = loss * what
    norm, finite = optim.update(model, optimizer, 0.3, loss)
    assert not finite and (where == "loss" or not torch.isfinite(norm))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert all(torch.equal(t, moments[key]) for key, t in optim.state(model, optimizer)[0].items())


# ---- its state ------------------------------------------------------------------------------------------------------


def through_files(folder: Path, model: Llama, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    tensors, numbers = optim.state(model, optimizer)
    files.write_tensors(folder / "optimizer.safetensors", tensors)
    files.write_json(folder / "numbers.json", numbers)
    return load_file(folder / "optimizer.safetensors"), json.loads((folder / "numbers.json").read_text())


@MODELS
def test_going_on_from_a_saved_state_is_not_stopping(base: Path, tmp_path: Path, make: Callable[[Path], Llama]) -> None:
    straight = make(base)
    optimizer, _ = optim.make_optimizer(straight, CFG)
    take_steps(straight, optimizer, range(3))
    saved, middle = through_files(tmp_path, straight, optimizer), weights(straight)
    names = {name for name, p in straight.named_parameters() if p.requires_grad}
    assert {key.rpartition(".")[0] for key in saved[0]} == names
    assert {key.rpartition(".")[2] for key in saved[0]} == {"exp_avg", "exp_avg_sq", "step"}
    take_steps(straight, optimizer, range(3, 7))

    resumed = make(base)
    with torch.no_grad():
        for name, p in resumed.named_parameters():
            p.copy_(middle[name])
    again, _ = optim.make_optimizer(resumed, CFG)
    optim.load_state(resumed, again, *saved)
    take_steps(resumed, again, range(3, 7))
    expected = weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    ends = [optim.state(model, made)[0] for model, made in ((straight, optimizer), (resumed, again))]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_moments_that_are_forgotten_or_swapped_would_be_seen(base: Path, tmp_path: Path) -> None:
    """The negative control of the test above."""
    model = lora(base)
    optimizer, _ = optim.make_optimizer(model, CFG)
    take_steps(model, optimizer, range(3))
    tensors, numbers = through_files(tmp_path, model, optimizer)
    swapped = dict(tensors)
    gate, up = (f"model.layers.0.mlp.{name}_proj.lora_A.exp_avg" for name in ("gate", "up"))
    swapped[gate], swapped[up] = tensors[up], tensors[gate]
    ends = []
    for state in (tensors, {}, swapped):
        copy = lora(base)
        ref.copy_adapters(ref.own_parameters(model), ref.own_parameters(copy))
        again, _ = optim.make_optimizer(copy, CFG)
        optim.load_state(copy, again, state, numbers if state else {})
        take_steps(copy, again, range(3, 4))
        ends.append(weights(copy))
    for wrong in ends[1:]:
        assert any(not torch.equal(wrong[name], tensor) for name, tensor in ends[0].items())


def test_a_run_at_its_start_has_no_state(base: Path) -> None:
    model = lora(base)
    optimizer, _ = optim.make_optimizer(model, CFG)
    assert optim.state(model, optimizer) == ({}, {})
    optim.load_state(model, optimizer, {}, {})
    assert not optimizer.state


def test_foreign_missing_and_misshapen_state_is_refused(base: Path) -> None:
    model = lora(base)
    optimizer, _ = optim.make_optimizer(model, CFG)
    take_steps(model, optimizer, range(1))
    tensors, numbers = optim.state(model, optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = "model.layers.1.self_attn.k_proj.lora_B"

    def refused(changed: dict[str, Tensor], said: str) -> None:
        fresh = lora(base)
        made, _ = optim.make_optimizer(fresh, CFG)
        with pytest.raises(ValueError, match=said):
            optim.load_state(fresh, made, changed, numbers)
        assert not made.state

    refused(tensors | {"model.layers.7.self_attn.k_proj.lora_B.exp_avg": torch.zeros(1)}, "layers.7.self_attn.k_proj")
    refused({key: t for key, t in tensors.items() if not key.startswith(name)}, name)
    # one of a parameter's three is gone, or has another shape: found when it is loaded, not at the first step
    refused({key: t for key, t in tensors.items() if key != f"{name}.exp_avg_sq"}, name)
    refused(tensors | {f"{name}.exp_avg": torch.zeros(3, 3)}, name)


def test_the_state_of_eight_bit_moments_can_be_written(tmp_path: Path) -> None:
    """bitsandbytes keeps one table of levels for all parameters, and safetensors refuses tensors that share memory."""
    model = nn.ModuleDict({name: nn.Linear(96, 64, bias=False) for name in ("first", "second")})
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2)
    for index, parameter in enumerate(model.parameters()):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    tensors, numbers = through_files(tmp_path, model, optimizer)
    assert {key.rpartition(".")[2] for key in tensors} >= {"state1", "state2", "absmax1", "absmax2"}
    assert numbers == {"first.weight.step": 0, "second.weight.step": 0}
    fresh = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2)
    marked = {key: torch.full_like(t, 3) if ".state" in key else t for key, t in tensors.items()}
    optim.load_state(model, fresh, marked, numbers)
    for parameter in model.parameters():
        assert fresh.state[parameter]["state1"].eq(3).all() and fresh.state[parameter]["qmap1"].ne(0).any()
