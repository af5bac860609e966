"""A compiler that fails, and steps whose outcome is read while the next one runs."""

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx

from minitune import parallel
from minitune.parallel import CompiledForward
from minitune.step import Outcomes


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(CompiledForward, "failed", False)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    return model


class NoCompiler(torch._dynamo.exc.TorchDynamoException):
    pass


def test_blocks_that_cannot_be_compiled_run_as_they_are_and_a_line_says_so(
    blocks: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def compiler(forward):
        def compiled(*inputs):
            tried.append(1)
            raise NoCompiler("no C compiler is here\nand much more about it")

        return compiled

    x = torch.randn(2, 4)
    expected = [layer(x) for layer in blocks.layers]
    monkeypatch.setattr(torch, "compile", compiler)
    parallel.compile_blocks(blocks)
    assert all(torch.equal(layer(x), y) for layer, y in zip(blocks.layers, expected, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "not compiled" in lines[0] and "no C compiler is here" in lines[0]
    assert len(tried) == 1  # the first failure is enough for all


def test_a_compiler_that_fails_for_the_backward_pass_alone_is_found_in_the_forward_pass(
    blocks: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real torch.compile: PyTorch itself would leave the backward graph until it is needed."""
    real, graphs = compile_fx._compile_fx_inner, []

    def forward_alone(graph, *arguments, **named):
        graphs.append(named["is_backward"])
        if named["is_backward"]:
            raise RuntimeError("the assembler takes no backward kernel\nand much more about it")
        return real(graph, *arguments, **named)

    def gradients() -> list[torch.Tensor]:
        y = x
        for layer in blocks.layers:
            y = layer(y).sin()
        return torch.autograd.grad(y.sum(), list(blocks.parameters()))

    x = torch.randn(2, 4)
    expected = gradients()
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", forward_alone)
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)  # nothing compiled earlier will do
    torch._dynamo.reset()
    parallel.compile_blocks(blocks)
    assert all(torch.equal(ours, plain) for ours, plain in zip(gradients(), expected, strict=True))
    assert CompiledForward.failed and graphs.count(True) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert "not compiled" in line and "RuntimeError: the assembler takes no backward kernel" in line
    assert not torch._functorch.config.force_non_lazy_backward_lowering  # of the process


def test_a_mistake_of_ones_own_is_no_compiler_s(blocks: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    parallel.compile_blocks(blocks)
    with pytest.raises(RuntimeError):
        blocks.layers[0](torch.randn(2, 5))


def test_steps_are_read_in_order_and_the_one_under_way_is_left() -> None:
    def numbers(step: int) -> list[torch.Tensor]:
        return [torch.tensor(float(step)), torch.tensor(2.0 * step), torch.tensor(step != 2)]

    outcomes = Outcomes(torch.device("cpu"))
    outcomes.add(1, *numbers(1))
    assert [o.step for o in outcomes.settled()] == [1]  # a CPU has done what it was told
    outcomes.ahead = 1  # as on a GPU, but for the events
    outcomes.under_way.clear()
    seen = []
    for step in (1, 2, 3):
        outcomes.under_way.append((step, torch.stack([t.float() for t in numbers(step)]), None))
        seen.append([o.step for o in outcomes.settled()])
    assert seen == [[], [1], [2]]
    assert outcomes.latest.step == 2 and not outcomes.latest.finite
    [last] = outcomes.all()
    assert (last.step, last.loss, last.norm, last.finite) == (3, 3.0, 6.0, True) and not outcomes.all()
