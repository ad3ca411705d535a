"""Products large enough for matrix units, entry by entry against float64.

Where the instruction set has such units, float32 operands are split into three bfloat16 parts for them; nobody may
notice. Every bound here is one that plain float32 arithmetic keeps, whatever the instruction set.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronfac.ops import covariance, covariance_, damped_inverse, kron_precondition
from tests.ops.cases import LAYOUTS, arrange, threads

EPS = torch.finfo(torch.float32).eps
# Around strips of 16, blocks of 32, runs of 128 terms and chunks of 512.
SIDES = st.sampled_from([96, 97, 111, 112, 127, 128, 129, 160, 193, 256, 289, 513, 641, 700])
TERMS = st.sampled_from([96, 97, 112, 127, 128, 129, 255, 256, 400, 1100])


def spread(m: int, n: int) -> Tensor:
    """Entries over twelve orders of magnitude, so that a lost part of any shows."""
    return torch.randn(m, n, dtype=torch.float64) * 10 ** (12 * torch.rand(m, n, dtype=torch.float64) - 6)


def outer_error(result: Tensor, left: Tensor, right: Tensor) -> float:
    """Largest error of left @ right (float64) in units of eps times the sum of the absolute products."""
    bound = left.abs() @ right.abs()
    return float(((result.double() - left @ right).abs() / (EPS * bound + 1e-300)).max())


@settings(max_examples=40)
@given(
    m=TERMS,
    d=SIDES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    count=st.sampled_from([1, 2]),
    wide=st.booleans(),
)
def test_covariance(m: int, d: int, dtype: torch.dtype, layout: str, bias: bool, count: int, wide: bool) -> None:
    x = arrange((spread(m, d) if wide else torch.randn(m, d)).clamp(-6e4, 6e4).to(dtype), layout)
    with threads(count):
        result = covariance(x, bias)
    exact = torch.cat([x, torch.ones(m, 1)], 1).double() if bias else x.double()
    assert outer_error(result, exact.mT, exact) <= 64  # rows that are all the same round all the same way


@settings(max_examples=30)
@given(o=SIDES, i=SIDES, layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_kron_precondition(o: int, i: int, layout: str, dtype: torch.dtype) -> None:
    left, right = torch.rand(o, o), torch.rand(i, i)
    grad = arrange(torch.rand(o, i).to(dtype), layout)
    (out,), dots = kron_precondition([grad], [left + left.mT], [right + right.mT])
    expected = (left + left.mT).double() @ grad.double() @ (right + right.mT).double()
    unit = EPS if dtype == torch.float32 else torch.finfo(dtype).eps
    assert float(((out.double() - expected).abs() / expected).max()) <= 16 * unit
    assert dots[0].item() == pytest.approx((expected * grad.double()).sum().item(), rel=1e-5)


@pytest.mark.cpu_only("threads of the CPU")
@pytest.mark.parametrize("n", [300, 640])
def test_results_do_not_depend_on_the_number_of_threads(n: int) -> None:
    factor = covariance(torch.randn(2 * n, n), scale=1 / n)
    grad = torch.randn(n, n + 77)
    wide = covariance(torch.randn(2 * n, n + 77), scale=1 / n)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            (inverse,), _ = damped_inverse([factor], torch.tensor(0.1))
            (out,), _ = kron_precondition([grad], [factor], [wide])
        results.append((inverse, out))
    for inverse, out in results[1:]:
        assert torch.equal(inverse, results[0][0])
        assert torch.equal(out, results[0][1])


def test_long_sums_do_not_lose_digits() -> None:
    x = torch.rand(40000, 100) + 1
    result, exact = covariance(x), x.double().mT @ x.double()
    assert float(((result.double() - exact).abs() / exact).max()) <= 8 * EPS


def test_decay_reaches_every_entry() -> None:
    x, old = torch.randn(200, 530), torch.randn(530, 530)
    out = old + old.mT
    expected = 0.5 * out.double() + 0.25 * x.double().mT @ x.double()
    covariance_(out, x, decay=0.5, scale=0.25)
    assert torch.equal(out, out.mT)
    assert float((out.double() - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
def test_what_is_not_finite_spoils_its_own_row_and_column(value: float) -> None:
    x = torch.randn(150, 200)
    x[70, 33] = value
    result = covariance(x)
    spoilt = torch.zeros(200, 200, dtype=torch.bool)
    spoilt[33] = spoilt[:, 33] = True
    assert torch.equal(result.isfinite(), ~spoilt) or value == 3.4e38
    assert not result[33, 33].isfinite()
    assert bool(result[~spoilt].isfinite().all())


def test_tiny_numbers_keep_their_products() -> None:
    # 1e-30 is far above what flushes to zero in any part that counts.
    x = torch.randn(128, 128) * 1e-15
    result, exact = covariance(x), x.double().mT @ x.double()
    assert float(((result.double() - exact).abs() / exact.diagonal().max()).max()) <= 1e-5
