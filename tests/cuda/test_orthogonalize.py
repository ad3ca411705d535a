"""The GPU's kernels of orthogonalize_, run on the CPU, against the naive reference in float64."""

from __future__ import annotations

import pytest
import torch

from kronfac.ops import naive
from tests.cuda import emulation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 40), (8, 1025), (20, 2600), (70, 3000), (130, 700)])
@pytest.mark.parametrize("passes", [1, 2])
def test_equals_the_reference(m: int, n: int, passes: int, dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64)).Q.T.to(dtype).contiguous()
    w = torch.randn(n, dtype=dtype)
    expected = w.double().clone()
    total = naive.orthogonalize_(expected, basis.double(), passes)
    coefficients, blocks = emulation.orthogonalize_(w, basis, passes)
    assert blocks > 1 or n <= 1024
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert (w.double() - expected).abs().max() <= tolerance * n**0.5
    assert (coefficients.double() - total).abs().max() <= tolerance * n**0.5


def test_any_strides_touch_nothing_else() -> None:
    n, m = 1500, 7
    basis = torch.linalg.qr(torch.randn(n, m)).Q.T  # a step of m from column to column
    memory = torch.randn(n, 2)
    w, beside = memory[:, 0], memory[:, 1].clone()
    expected = w.double().clone()
    naive.orthogonalize_(expected, basis.double(), 2)
    emulation.orthogonalize_(w, basis, 2)
    torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(memory[:, 1], beside)
