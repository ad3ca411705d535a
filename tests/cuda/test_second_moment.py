"""The GPU's kernels of second_moment_, run on the CPU, against the naive reference in float64."""

from __future__ import annotations

import pytest
import torch

from kronfac.ops import naive
from tests.cuda import emulation
from tests.ops.cases import DTYPES, arrange, poisoned
from tests.ops.test_second_moment import bounded_error

CASES = [  # examples, positions, outputs, inputs: edges of tiles and of steps, one position, none, several parts
    (3, 5, 130, 67, 1),
    (2, 8, 64, 64, 1),
    (7, 1, 33, 129, 1),
    (300, 1, 20, 9, 2),
    (40, 9, 5, 70, 5),
    (0, 4, 6, 5, 1),
    (4, 0, 6, 5, 1),
]


@pytest.mark.parametrize(("n", "t", "o", "d", "least_parts"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_reference(n: int, t: int, o: int, d: int, least_parts: int, dtype: torch.dtype, bias: bool) -> None:
    g, x = (torch.randn(n, t, size, dtype=torch.float64).to(dtype) for size in (o, d))
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = poisoned((o, d + bias), out_dtype)
    assert emulation.second_moment_(out, g, x, bias, 0.0, 0.5) >= least_parts
    expected = torch.empty(o, d + bias, dtype=torch.float64)
    naive.second_moment_(expected, g.double(), x.double(), bias, 0.0, 0.5)
    assert bounded_error(out, expected, g, x, bias, 0.5) <= (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", ["transposed", "offset"])
@pytest.mark.parametrize("shape", [(3, 7, 40, 21), (300, 1, 12, 7)])
def test_any_strides_and_the_old_value(shape: tuple[int, int, int, int], layout: str) -> None:
    n, t, o, d = shape
    g, x = (arrange(torch.randn(n, t, size), layout) for size in (o, d))
    start = torch.randn(o, d)
    out = start.t().contiguous().t()
    expected = start.double()
    emulation.second_moment_(out, g, x, False, 0.9, 0.5)
    naive.second_moment_(expected, g.double(), x.double(), False, 0.9, 0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
