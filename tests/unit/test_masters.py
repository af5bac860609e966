"""fp32 masters in two halves: joined exactly, moved as fp32 weights are, saved and loaded whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import files, masters, optim
from minitune.config import OptimConfig
from minitune.kernels import adamw
from minitune.kernels.adamw import join, split
from minitune.masters import MasterAdamW


def test_a_number_is_its_two_halves() -> None:
    numbers = torch.randn(100_000) * torch.logspace(-30, 30, 100_000)
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 0], dtype=torch.int32).view(torch.float32)
    for x in (numbers, ties, torch.tensor([0.0, -0.0, 1e-45, float("inf"), -float("inf")])):
        upper, lower = split(x)
        assert upper.dtype == torch.bfloat16 and lower.dtype == torch.int16
        assert torch.equal(join(upper, lower).view(torch.int32), x.view(torch.int32))
    upper, _ = split(numbers)
    assert torch.equal(upper, numbers.bfloat16())  # nearest; the ties above go away from zero, PyTorch's to even
    assert not torch.equal(join(upper, torch.zeros_like(upper, dtype=torch.int16)), numbers)


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, shape in {"vector": (96,), "small": (40, 50), "large": (96, 130)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw).bfloat16().to(dtype)))

    def take_steps(self, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            for parameter in self.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw).bfloat16().to(parameter.dtype)
            optim.set_learning_rate(optimizer, 1e-3 / (1 + number))
            optim.update(self, optimizer, 1.0, torch.zeros(()))
            optimizer.zero_grad()


def whole(model: Weights, optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {name: join(p.detach(), optimizer.state[p]["lower"]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("eight_bits", [False, True])
def test_masters_move_as_fp32_weights_under_pytorch_s_adamw(eight_bits: bool) -> None:
    cfg = OptimConfig(weight_decay=0.1)
    halves, plain = Weights(torch.bfloat16), Weights(torch.float32)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer, line = optim.make_optimizer(halves, cfg)
    assert type(optimizer) is MasterAdamW and line == "adamw"
    optimizer.eight_bits = eight_bits
    other, _ = optim.make_optimizer(plain, cfg)
    assert type(other) is torch.optim.AdamW
    halves.take_steps(optimizer, range(10))
    plain.take_steps(other, range(10))
    for name, moved in whole(halves, optimizer).items():
        expected = dict(plain.named_parameters())[name]
        far = ((moved - expected).norm() / (expected - start[name]).norm()).item()
        large = name == "large" and eight_bits
        assert far < (0.05 if large else 1e-4), name
        assert not large or far > 1e-4  # eight bits are fewer
        assert optimizer.state[dict(halves.named_parameters())[name]]["exp_avg"].dtype == (
            torch.uint8 if large else torch.float32
        )


def test_bf16_alone_would_lose_most_of_it() -> None:
    """The negative control: without the lower halves, steps of 1e-6 leave numbers near 1 where they are."""
    model = Weights(torch.bfloat16)
    optimizer, _ = optim.make_optimizer(model, OptimConfig(weight_decay=0.0))
    optim.set_learning_rate(optimizer, 1e-6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for name, moved in whole(model, optimizer).items():
        stayed = dict(model.named_parameters())[name] == before[name]
        assert stayed.float().mean() > 0.9
        torch.testing.assert_close(before[name].float() - moved, torch.full_like(moved, 5e-6), rtol=0.1, atol=2e-7)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_stop_and_a_start_change_no_bit(tmp_path: Path, eight_bits: bool) -> None:
    def optimizer_of(model: Weights) -> MasterAdamW:
        made, _ = optim.make_optimizer(model, OptimConfig(weight_decay=0.1))
        made.eight_bits = eight_bits
        return made

    straight = Weights(torch.bfloat16)
    optimizer = optimizer_of(straight)
    straight.take_steps(optimizer, range(5))
    tensors, numbers = optim.state(straight, optimizer)
    assert not numbers
    files.write_tensors(tmp_path / "optimizer.safetensors", tensors)
    files.write_tensors(tmp_path / "trained.safetensors", optim.trained_parameters(straight))
    straight.take_steps(optimizer, range(5, 10))

    for lost in (None, "lower"):  # the negative control: masters without their lower halves
        resumed = Weights(torch.bfloat16)
        resumed.load_state_dict(load_file(tmp_path / "trained.safetensors"))
        again = optimizer_of(resumed)
        saved = load_file(tmp_path / "optimizer.safetensors")
        if lost:
            saved = {key: t * 0 if key.endswith(lost) else t for key, t in saved.items()}
        optim.load_state(resumed, again, saved, numbers)
        resumed.take_steps(again, range(5, 10))
        ends = whole(straight, optimizer), whole(resumed, again)
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]) is (lost is None)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = Weights(torch.bfloat16)
    optimizer, _ = optim.make_optimizer(model, OptimConfig())
    model.take_steps(optimizer, range(2))
    before, state = whole(model, optimizer), {k: t.clone() for k, t in optim.state(model, optimizer)[0].items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    _, finite = optim.update(model, optimizer, 1.0, torch.zeros(()))
    assert not finite
    assert all(torch.equal(w, before[name]) for name, w in whole(model, optimizer).items())
    assert all(torch.equal(t, state[k]) for k, t in optim.state(model, optimizer)[0].items())


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_the_nearest_of_bitsandbytes_levels(signed: bool) -> None:
    levels, borders = masters.levels(torch.device("cpu"), signed)
    assert len(levels) == 256 and (levels.diff() > 0).all() and levels[-1] == 1
    x = torch.cat([torch.linspace(-1 if signed else 0, 1, 9001), torch.logspace(-9, 0, 9001)])
    values = torch.zeros(len(x), dtype=torch.uint8)
    moment = adamw.Moment(values, torch.zeros(-(-len(x) // 256)), levels, borders)
    adamw.write(values, x, moment, 0)
    scales = moment.scales.repeat_interleave(256)[: len(x)]
    nearest = (levels[None] - (x / scales)[:, None]).abs().min(1).values
    torch.testing.assert_close((levels[values.int()] - x / scales).abs(), nearest, rtol=0, atol=1e-7)
