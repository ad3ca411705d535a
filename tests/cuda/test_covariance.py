"""The GPU's kernels of covariance, run on the CPU, against the naive reference in float64."""

from __future__ import annotations

import pytest
import torch

from kronfac.ops import naive
from tests.cuda import emulation
from tests.ops.cases import DTYPES, arrange, covariance_error, poisoned

CASES = [(9, 130, 1), (40, 64, 1), (3, 1, 1), (0, 5, 1), (4, 0, 1), (1100, 12, 4), (700, 129, 2)]


@pytest.mark.parametrize(("m", "d", "least_parts"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_reference(m: int, d: int, least_parts: int, dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(m, d, dtype=torch.float64).to(dtype)
    out = poisoned((d + bias, d + bias), torch.float64 if dtype == torch.float64 else torch.float32)
    assert emulation.covariance_(out, x, bias, 0.0, 0.5) >= least_parts
    assert torch.equal(out, out.T)
    expected = naive.covariance(x.double(), bias, 0.5)
    assert covariance_error(out, expected) <= (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded_first"])
@pytest.mark.parametrize("m", [50, 700])
def test_any_strides_and_the_old_value(m: int, layout: str) -> None:
    x = arrange(torch.randn(m, 40), layout)
    start = naive.covariance(torch.randn(60, 40), False, 1.0)
    memory = torch.full((80, 80), float("nan"))
    out = memory[::2, ::2]
    out.copy_(start)
    emulation.covariance_(out, x, False, 0.9, 0.5)
    expected = 0.9 * start.double() + naive.covariance(x.double(), False, 0.5)
    assert covariance_error(out, expected) <= 1e-5
    assert memory[1::2].isnan().all()
