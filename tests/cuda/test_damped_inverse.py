"""The GPU's kernels of damped_inverse, run on the CPU, against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronfac.ops import naive
from tests.cuda import emulation

SMALL, LARGE = (128, 127, 65, 17, 16, 2, 1), (333, 320, 200, 129)  # an edge within a block of pivots, and none


def factor(n: int, dtype: torch.dtype) -> Tensor:
    """A covariance whose strict upper triangle, which no kernel may read, is NaN."""
    x = torch.randn(2 * n + 3, n, dtype=torch.float64)
    f = (x.T @ x / len(x)).to(dtype)
    return f.tril() + torch.full_like(f, float("nan")).triu(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orders", [SMALL, LARGE])
def test_equals_the_reference(orders: tuple[int, ...], dtype: torch.dtype) -> None:
    factors = [factor(n, dtype) for n in orders]
    damping = torch.linspace(0.01, 0.3, len(orders), dtype=dtype)
    inverses, info = emulation.damped_inverse(factors, damping)
    expected, _ = naive.damped_inverse([f.double() for f in factors], damping.double())
    assert info.tolist() == [0] * len(orders)
    for inverse, truth in zip(inverses, expected, strict=True):
        assert torch.equal(inverse, inverse.T)
        error = (inverse.double() - truth).norm() / truth.norm()
        assert error <= (1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("orders", [SMALL[:5], LARGE])
def test_bad_matrices_are_named_and_spoil_nothing(orders: tuple[int, ...]) -> None:
    factors = [factor(n, torch.float64) for n in orders]
    good = emulation.damped_inverse(factors, torch.tensor(0.1, dtype=torch.float64))[0]
    factors[0][-1, -1] = -5.0  # the last leading minor
    factors[1][7, 7] = -50.0
    factors[2][9, 3] = float("inf")
    inverses, info = emulation.damped_inverse(factors, torch.tensor(0.1, dtype=torch.float64))
    assert info.tolist()[:4] == [orders[0], 8, -1, 0]
    assert all(inverse.isnan().all() for inverse in inverses[:3])
    assert torch.equal(inverses[3], good[3])


@pytest.mark.parametrize("orders", [(16, 4), (140, 129)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_damping_is_told_in_info(orders: tuple[int, ...], bad: float) -> None:
    inverses, info = emulation.damped_inverse([factor(n, torch.float32) for n in orders], torch.tensor([0.1, bad]))
    assert info.tolist() == [0, -1]
    assert inverses[0].isfinite().all()
    assert inverses[1].isnan().all()


@pytest.mark.parametrize("n", [20, 150])
def test_an_inverse_beyond_the_type_is_told_in_info(n: int) -> None:
    (inverse,), info = emulation.damped_inverse([torch.eye(n) * 1e-39], torch.tensor(0.0))
    assert info.tolist() == [-1]
    assert inverse.isnan().all()


@pytest.mark.parametrize("n", [60, 150])
def test_any_strides(n: int) -> None:
    f = factor(n, torch.float64)
    memory = torch.full((2 * n, 3 * n), float("nan"), dtype=torch.float64)
    view = memory[::2, ::3].T
    view.copy_(f)
    damping = torch.tensor(0.1, dtype=torch.float64)
    assert torch.equal(emulation.damped_inverse([view], damping)[0][0], emulation.damped_inverse([f], damping)[0][0])
