"""Kernels that are told a row's stride reach numbers past 2^31, in memory that is only there where it is touched."""

import importlib.util
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import kernel_cases
import pytest
import torch
from torch import Tensor

from minitune.kernels import launch, low_rank, softmax
from minitune.kernels.dropout import Dropout

APART = 2**30  # numbers from row to row: row 2 is where 32 bits end
NORESERVE = 0x4000  # Linux: promise no memory for it

pytestmark = pytest.mark.skipif(
    sys.platform != "linux"
    or launch.triton is None
    or os.environ.get("TRITON_INTERPRET") != "1"
    or not kernel_cases.interpreter_works(),
    reason="needs Triton whose interpreter works here, and Linux's memory",
)


def far_apart(rows: Tensor) -> Tensor:
    """The same rows (N, C) fp16 with strides (2^30, 1). As many numbers lie before as an int32 that wraps goes back."""
    room = mmap.mmap(-1, 2 * (2 + len(rows)) * APART, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    far = torch.frombuffer(room, dtype=torch.float16).as_strided(rows.shape, (APART, 1), 2 * APART)
    return far.copy_(rows)


def drop() -> Dropout:
    return Dropout(torch.tensor([3, 4]), 19661)


def run_softmax(module: ModuleType, x: Tensor) -> tuple[Tensor, ...]:
    return module.cross_entropy_(x, torch.arange(len(x))), x.clone()


def run_down(module: ModuleType, x: Tensor) -> tuple[Tensor, ...]:
    A = torch.linspace(-1, 1, 3 * x.shape[1]).view(3, -1).half()
    return (module.down(x, A, 1.25, 1, drop()),)


def run_gradient(module: ModuleType, x: Tensor) -> tuple[Tensor, ...]:
    t = torch.linspace(-1, 1, 3 * len(x)).view(-1, 3).half()
    return (module.gradient(t, x, 1, drop()),)


@pytest.mark.parametrize(
    ("module", "run"),
    [(softmax, run_softmax), (low_rank, run_down), (low_rank, run_gradient)],
    ids=lambda x: x.__name__,
)
def test_rows_past_two_to_the_31(module: ModuleType, run: Callable, tmp_path: Path, monkeypatch) -> None:
    rows = torch.randn(5, 7).half()
    expected = run(module, rows.clone())  # the plain twin, which PyTorch's own indexing serves

    def distance(of: ModuleType) -> float:
        monkeypatch.setattr(of, "fused", lambda x: True)
        found = run(of, far_apart(rows))
        return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True))

    assert distance(module) < 5e-3  # of fp16
    source = Path(module.__file__).read_text()
    assert ".to(tl.int64)" in source
    (tmp_path / "narrow.py").write_text(source.replace(".to(tl.int64)", ""))
    spec = importlib.util.spec_from_file_location("narrow", tmp_path / "narrow.py")
    narrow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(narrow)
    assert distance(narrow) > 0.1
