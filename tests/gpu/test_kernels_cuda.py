"""Triton's kernels on a card, in bf16, against their plain twins in fp64."""

import kernel_cases
import pytest
import torch
from kernel_cases import CASES, Case, Draw, distance

from minitune import nf4
from minitune.kernels import four_bits, launch, softmax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_computes_what_its_twin_does(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to fp64 than twice the twin's own distance in bf16, and the same bits each time."""
    exact = case.run(Draw("cpu", torch.float64, torch.bfloat16))
    wrong = case.wrong(Draw("cpu", torch.float64, torch.bfloat16))
    plain = case.run(Draw("cpu", torch.bfloat16, torch.bfloat16))
    ours = [case.run(Draw("cuda", torch.bfloat16, torch.bfloat16)) for _ in range(5)]
    bound = max(2 * distance(plain, exact), 2**-8, case.slack)
    assert distance(ours[0], exact) < bound
    assert distance(wrong, exact) > 2 * bound
    for again in ours[1:]:
        assert all(a is None or torch.equal(a, b) for a, b in zip(ours[0], again, strict=True))


def test_the_twins_are_not_the_same_code() -> None:
    x = torch.empty(1, device="cuda")
    assert all(module.fused(x) and not module.fused(x.cpu()) for module in kernel_cases.MODULES)
    assert launch.fault(torch.device("cuda")) is None


def test_four_bits_made_dense_are_bitsandbytes_to_the_bit() -> None:
    for rows, columns in ((192, 320), (7, 64), (333, 4096)):
        module = nf4.NF4Linear(columns, rows, False, torch.bfloat16).cuda()
        module.quantize(torch.randn(rows, columns) * 0.03)
        out = torch.full((rows, columns), float("nan"), dtype=torch.bfloat16, device="cuda")
        four_bits.dequantize(*module.storage(), nf4.levels(out.device), out)
        assert torch.equal(out, module.dense_weight())


def test_cross_entropy_beyond_two_billion_logits() -> None:
    """Places past 2^31 are reached; a row there gives what it gives alone."""
    V, rows = 128256, 17000
    assert rows * V > 2**31
    logits = torch.randn(1, V, device="cuda", dtype=torch.bfloat16).expand(rows, V).contiguous()
    labels = torch.arange(rows, device="cuda")
    alone = logits[-1:].clone()
    losses = softmax.cross_entropy_(logits, labels)
    loss = softmax.cross_entropy_(alone, labels[-1:])
    assert losses[-1] == loss[0] and torch.equal(logits[-1], alone[0])
    assert losses.isfinite().all() and losses.unique().numel() > 100
