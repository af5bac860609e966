"""fp64 rounded once to the dtypes of weight files."""

import pytest
import torch

from minitune.precision import rounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def neighbours(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Each number of a dtype, and the next one above it, in fp64; of fp32 some."""
    if dtype == torch.float32:
        lower = torch.randn(5000)
        upper = torch.nextafter(lower, torch.tensor(torch.inf))
    else:
        lower = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        lower = lower[lower.isfinite()].unique()  # ascending
        lower, upper = lower[:-1], lower[1:]
    return lower.double(), upper.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_about_the_middle_go_to_the_nearer_side(dtype: torch.dtype) -> None:
    lower, upper = neighbours(dtype)
    middle, a_little = (lower + upper) / 2, (upper - lower) * 2.0**-25
    assert torch.equal(rounded(middle + a_little, dtype).double(), upper)
    assert torch.equal(rounded(middle - a_little, dtype).double(), lower)
    for exact in (lower, upper):
        assert torch.equal(rounded(exact, dtype).double(), exact)
    even = rounded(middle, dtype).double()
    assert ((even == lower) | (even == upper)).all() and (even == lower).any() and (even == upper).any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_pytorch_s_own_way_would_be_caught(dtype: torch.dtype) -> None:
    lower, upper = neighbours(dtype)
    above = (lower + upper) / 2 + (upper - lower) * 2.0**-25
    assert not torch.equal(above.to(dtype).double(), upper)


def test_what_no_dtype_holds_stays_what_it_is() -> None:
    for value in (torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e300, -1e300):
        for dtype in DTYPES:
            exact = torch.tensor([value], dtype=torch.float64)
            there, expected = rounded(exact, dtype), exact.to(dtype)
            assert torch.equal(there, expected) or (there.isnan() and expected.isnan())
            assert torch.equal(there.signbit(), expected.signbit()) or there.isnan()
