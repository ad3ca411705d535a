"""covariance where its matrix is narrow, flat or large: each has a way of its own through the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.ops import covariance, covariance_, naive
from tests.ops.cases import DTYPES, arrange, covariance_error, poisoned, threads

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}
COUNTS = st.sampled_from([1, 2, 3])
OUT_LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "offset"])


def at_the_end(values: Tensor, gap: int) -> Tensor:
    """Rows `gap` elements apart, NaN between them, the last entry the last one of its memory."""
    m, d = values.shape
    memory = values.new_full(((m - 1) * (d + gap) + d,), float("nan"))
    view = memory.as_strided((m, d), (d + gap, 1))
    view.copy_(values)
    return view


def check_accumulation(
    x: Tensor, bias: bool, decay: float, scale: float, layout: str, count: int, tolerance: float
) -> Tensor:
    """covariance_ into an arbitrary matrix of this layout; what it holds afterwards."""
    d = x.shape[1] + bias
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    old = torch.randn(d, d, dtype=dtype) if decay else torch.full((d, d), float("nan"), dtype=dtype)
    out = arrange(old.clone(), layout)
    with threads(count):
        covariance_(out, x, bias, decay, scale)
    update = naive.covariance(x.double(), bias, scale)
    expected = decay * old.double() + update if decay else update
    norms = update.diagonal().sqrt()
    bound = tolerance * (norms[:, None] * norms + old.abs().nan_to_num(0.0))
    assert ((out - expected).abs() <= bound).all()
    return out


@given(
    m=st.sampled_from([1, 2, 3, 39, 40, 41, 79, 81, 191, 193, 257, 321, 1000, 8191, 8193]),
    d=st.integers(1, 66),
    gap=st.sampled_from([0, 1, 5, 70]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    decay=st.sampled_from([0.0, 0.5]),
    layout=OUT_LAYOUTS,
    count=COUNTS,
)
def test_narrow(
    m: int, d: int, gap: int, dtype: torch.dtype, bias: bool, decay: float, layout: str, count: int
) -> None:
    """Few columns: vectors run over the ends of rows into what is not part of the matrix, and never past its memory."""
    x = at_the_end(torch.randn(m, d, dtype=torch.float64).to(dtype), gap)
    check_accumulation(x, bias, decay, 0.5, layout, count, TOLERANCE[dtype])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("d", [1, 9, 16, 27, 33, 64])
@pytest.mark.parametrize("m", [8192, 8200, 16385, 30000])
def test_narrow_and_long(m: int, d: int, count: int) -> None:
    """Sums of several runs, whose last rows are packed, at one row after another."""
    x = torch.randn(m, d) + 1
    with threads(count):
        result = covariance(x, scale=1 / m)
        assert torch.equal(result, covariance(x, scale=1 / m))
    assert torch.equal(result, result.mT)
    assert covariance_error(result, naive.covariance(x.double(), False, 1 / m)) <= 1e-5


@given(
    m=st.sampled_from([1, 2, 8, 17, 191, 192, 193, 255, 257, 385, 511, 512, 513]),
    d=st.sampled_from([64, 65, 80, 95, 96, 97, 145, 191, 200, 383, 384, 385, 400, 500]),
    dtype=st.sampled_from(DTYPES),
    x_layout=st.sampled_from(["contiguous", "transposed", "strided", "offset"]),
    bias=st.booleans(),
    decay=st.sampled_from([0.0, 0.95]),
    layout=OUT_LAYOUTS,
)
def test_flat(m: int, d: int, dtype: torch.dtype, x_layout: str, bias: bool, decay: float, layout: str) -> None:
    """Few rows: blocks of sums are written into both triangles as soon as they are complete."""
    x = arrange(torch.randn(m, d, dtype=torch.float64).to(dtype), x_layout)
    results = []
    for count in (1, 3):
        torch.manual_seed(1)  # the same old values
        results.append(check_accumulation(x, bias, decay, 0.5, layout, count, TOLERANCE[dtype]))
    if m <= 192 and d > 64:  # flat under every instruction set
        assert torch.equal(*results)
    symmetric = covariance(x, bias)
    assert torch.equal(symmetric, symmetric.mT)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("m", [3, 200, 600])
@pytest.mark.parametrize("d", [1503, 1504, 2064])
def test_large_results(d: int, m: int, count: int, decay: float) -> None:
    """Results that are written past the caches, with whole cache lines and without."""
    out = check_accumulation(torch.randn(m, d), False, decay, 1.0, "contiguous", count, 1e-5)
    aligned = check_accumulation(torch.randn(m, d - 1), True, decay, 1.0, "offset", count, 1e-5)
    if not decay:
        assert torch.equal(out, out.mT)
        assert torch.equal(aligned, aligned.mT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("m", "d"), [(30, 12), (500, 30), (300, 64), (30, 200), (600, 200)])
def test_nonfinite_entries_reach_their_row_and_column_only(m: int, d: int, value: float) -> None:
    x = torch.rand(m, d) + 0.5
    x[m - 2, 7] = value
    result = covariance(x, bias=True)
    touched = torch.zeros(d + 1, d + 1, dtype=torch.bool)
    touched[7] = touched[:, 7] = True
    assert torch.equal(~result.isfinite(), touched)
    # Matrix units make NaN of infinity too (docs/operators.md), and never the other way round.
    assert bool((result[7].isnan() >= naive.covariance(x.double(), True)[7].isnan()).all())


@pytest.mark.parametrize("shape", [(20, 10), (5000, 20), (20, 300), (600, 300), (3, 1600)])
def test_nothing_of_an_unread_result_survives(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    expected = covariance(x, True, 0.3)
    for layout in ("contiguous", "transposed", "strided"):
        out = poisoned((shape[1] + 1, shape[1] + 1), torch.float32, layout)
        covariance_(out, x, True, 0.0, 0.3)
        assert torch.equal(out, expected)
