"""Triton's kernels, interpreted on the CPU in fp32, against their plain twins in fp64."""

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch
from kernel_cases import CASES, Case, Draw, distance

from minitune import adapters, byhand, nf4
from minitune.config import LoRAConfig
from minitune.kernels import four_bits, launch, low_rank, softmax, swiglu
from minitune.kernels.dropout import Dropout, kept
from minitune.model import Llama, LlamaConfig

interpreted = pytest.mark.skipif(
    launch.triton is None or os.environ.get("TRITON_INTERPRET") != "1" or not kernel_cases.interpreter_works(),
    reason="needs Triton whose interpreter works here, and TRITON_INTERPRET=1 (set by conftest where there is no GPU)",
)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in kernel_cases.MODULES:
        monkeypatch.setattr(module, "fused", lambda x: True)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_computes_what_its_twin_does(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = case.run(Draw("cpu", torch.float64, torch.float32))
    wrong = case.wrong(Draw("cpu", torch.float64, torch.float32))
    plain = case.run(Draw("cpu", torch.float32, torch.float32))
    for module in kernel_cases.MODULES:
        monkeypatch.setattr(module, "fused", lambda x: True)
    ours = case.run(Draw("cpu", torch.float32, torch.float32))
    assert distance(plain, exact) < 3e-6  # the twin itself
    assert distance(ours, exact) < 3e-6
    assert distance(wrong, exact) > 1e-2  # a mistake of this size is no rounding
    for mine, its in zip(ours, plain, strict=True):
        assert mine is None or mine.dtype == its.dtype


@interpreted
def test_four_bits_made_dense_are_bitsandbytes_to_the_bit() -> None:
    for rows, columns in ((192, 320), (7, 64), (33, 4096)):
        module = nf4.NF4Linear(columns, rows, False, torch.float32)
        module.quantize(torch.randn(rows, columns) * 0.03)
        out = torch.full((rows, columns), float("nan"))
        four_bits.dequantize(*module.storage(), nf4.levels(out.device), out)
        assert torch.equal(out, module.dense_weight())


@interpreted
def test_huge_and_missing_logits(fused: None) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 0.0, 0.0], [-1e30, -1e30, -1e30]])
    losses = softmax.cross_entropy_(logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 0.6931472, 1.0986123]))
    expected = torch.tensor([[0, 0, 0], [0, -0.5, 0.5], [1 / 3, 1 / 3, -2 / 3]])
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("rank", [64, pytest.param(16, marks=pytest.mark.slow)])  # the largest needs most memory
def test_every_kernel_compiles_for_a_gpu(rank: int) -> None:
    """For Hopper, in a process of its own: the interpreter is chosen when Triton is first imported."""
    if launch.triton is None:
        pytest.skip("Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "compile_kernels.py", str(rank)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "13 kernels" in done.stdout, done.stdout


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_masks_are_fair_and_independent() -> None:
    """Share dropped, and the correlation of neighbours, of adapters and of seeds, within five standard deviations."""
    n = 1024
    drop, other = (Dropout(torch.tensor(seeds), 0.25 * 65536) for seeds in ([3, 4], [5, 6]))
    masks = [kept(drop, which, n, n).double() for which in range(4)]
    masks.append(kept(other, 0, n, n).double())
    for mask in masks:
        assert abs(mask.mean().item() - 0.75) < 5 * (0.25 * 0.75) ** 0.5 / n
    centred = [(mask - 0.75) / (0.25 * 0.75) ** 0.5 for mask in masks]
    pairs = [(centred[i], centred[j]) for i in range(5) for j in range(i)]
    pairs += [(m[1:], m[:-1]) for m in centred] + [(m[:, 1:], m[:, :-1]) for m in centred]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 / n
    corners = centred[0][:-1, :-1] * centred[0][1:, :-1] * centred[0][:-1, 1:] * centred[0][1:, 1:]
    assert abs(corners.mean().item()) < 5 / n  # four places that share their rows and columns
    random = torch.linalg.svdvals(torch.randn(n, n, dtype=torch.float64))[0]
    assert torch.linalg.svdvals(centred[0])[0] < 1.05 * random  # no low-rank pattern


def test_what_is_kept_makes_up_for_what_is_dropped() -> None:
    drop = Dropout.draw(0.1, torch.device("cpu"))
    share = kept(drop, 0, 2000, 300).double().mean().item()
    assert share * drop.scale == pytest.approx(1, abs=5e-3) and drop.scale == pytest.approx(1 / 0.9, rel=1e-4)
    assert not torch.equal(kept(drop, 0, 50, 50), kept(Dropout.draw(0.1, torch.device("cpu")), 0, 50, 50))
    assert torch.equal(kept(drop, 0, 50, 50), kept(drop, 0, 60, 80)[:50, :50])  # of a place, not of a shape


# ---- cards that cannot run them ------------------------------------------------------------------------------------


class Launches:
    """Stands for `launch.one_kernel`."""

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda out: out.fill_(1)


def test_a_card_that_takes_the_smallest_kernel_and_not_the_largest_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "triton", object())
    monkeypatch.setattr(launch, "one_kernel", Launches())
    assert launch.fault(torch.device("cpu")) is None
    shared, launched = 64, []

    def backward(*given: torch.Tensor | None) -> swiglu.Backward:
        t = given[1]
        launched.append(0 if t is None else t.shape[1])
        if launched[-1] > shared:
            raise RuntimeError("out of resource: shared memory, Required: 5, Hardware limit: 4.\nmore of it")
        return swiglu.Backward(given[2], None, None, None, None)

    monkeypatch.setattr(byhand, "swiglu_backward", backward)
    config = LlamaConfig(61, 64, 64, 2, 2, 2, 32, 64, 1e-5, 10000.0)
    plain, adapted = Llama(config), Llama(config)
    adapters.attach(adapted, LoRAConfig(r=16, rank_pattern={"layers.1.mlp.up_proj": 32}))
    assert byhand.fault(plain, torch.device("cpu")) is None and byhand.fault(adapted, torch.device("cpu")) is None
    shared = 16
    assert "shared memory, Required: 5" in byhand.fault(adapted, torch.device("cpu"))
    assert "more of it" not in byhand.fault(adapted, torch.device("cpu"))
    assert launched == [0, 32, 32, 32]


@interpreted
@pytest.mark.parametrize(("r", "share"), [(0, 0.05), (5, 0.0), (64, 0.0), (64, 0.05)])
def test_the_largest_kernels_are_launched(r: int, share: float, fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Noted:
        def __init__(self, name: str, kernel: object) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]):
            launched.append(self.name)
            return self.kernel[grid]

    for module, name in ((swiglu, "swiglu_backward_kernel"), (low_rank, "down_kernel"), (low_rank, "gradient_kernel")):
        monkeypatch.setattr(module, name, Noted(name, getattr(module, name)))
    byhand.largest_kernels(r, share, torch.device("cpu"))
    assert launched == ["swiglu_backward_kernel", *(["down_kernel", "gradient_kernel"] if r and share else [])]
