"""Residuals that few products certify: bounds by the recurrence and what it does not know of its round-off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kronfac.linalg.probes import make_generator
from kronfac.operators import hessian
from kronfac.spectrum import EigenResult, eigsh
from kronfac.spectrum._certificate import CHECKS, error_bound, random_frame
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import make_case
from tests.spectrum.eigenpairs import SPECTRA, check

LANCZOS = ("lanczos", "block_lanczos")
_DECAYING = np.concatenate([90.0 * 0.8 ** np.arange(40), np.random.default_rng(2).uniform(-0.01, 0.01, 260)])


def _true(matrix: Tensor, result: EigenResult) -> Tensor:
    vectors = result.vectors.double()
    residuals: Tensor = torch.linalg.vector_norm(matrix.double() @ vectors - vectors * result.values.double(), dim=0)
    return residuals


@pytest.mark.parametrize("method", LANCZOS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["gaussian", "decaying", "network", "tiny", "huge"])
def test_bounds_hold(name: str, dtype: torch.dtype, method: str) -> None:
    if dtype == torch.float32 and name in ("tiny", "huge"):
        return  # near the ends of its range
    matrix = with_spectrum(SPECTRA[name], dtype=dtype)
    norm = float(np.abs(SPECTRA[name]).max())
    slack = 1e-14 if dtype == torch.float64 else 1e-7  # of the dense product that is compared with
    for seed in range(3):
        result = eigsh(matrix, 12, method=method, tol=1e-4, seed=seed)
        check(result, matrix, 12, "magnitude", 1e-5)
        assert not result.measured
        true = _true(matrix, result)
        assert (true <= result.residuals.double() + slack * norm).all()
        # and say little more than needed
        assert (result.residuals.double() <= true + (1e-12 if dtype == torch.float64 else 5e-5) * norm).all()


def test_they_cost_three_products() -> None:
    operator = Counted(with_spectrum(_DECAYING))
    result = eigsh(operator, 20, tol=1e-4)
    explicit = eigsh(operator.matrix, 20, tol=1e-4, residuals="explicit")
    assert explicit.measured
    assert not result.measured
    assert explicit.products - result.products == 20 - CHECKS
    assert result.products == operator.products
    torch.testing.assert_close(result.values, explicit.values)
    torch.testing.assert_close(result.residuals, explicit.residuals, atol=1e-12 * 90, rtol=0.0)
    assert result.converged.all()
    # For so few pairs as many products measure them.
    assert eigsh(operator.matrix, 4).measured
    assert not eigsh(operator.matrix, 5).measured


@pytest.mark.parametrize("method", LANCZOS)
def test_bounds_where_nothing_has_converged(method: str) -> None:
    matrix = with_spectrum(np.linspace(0, 1, 300))
    operator = Counted(matrix)
    result = eigsh(operator, 6, method=method, max_products=32, tol=1e-9)
    assert 28 <= operator.products == result.products <= 32
    assert not result.measured
    assert set(result.status) == {"limit"}
    true = _true(matrix, result)
    torch.testing.assert_close(true, result.residuals, atol=1e-12, rtol=0.0)
    assert float(true.max()) > 1e-3


class _Rounding(Counted):
    """Products rounded to 12 bits: the recurrence goes on as if they were exact."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        product = super().__matmul__(vectors)
        mantissa, exponent = torch.frexp(product)
        return torch.ldexp(torch.round(mantissa * 2**12) / 2**12, exponent)


@pytest.mark.parametrize("method", LANCZOS)
def test_round_off_that_the_recurrence_does_not_see(method: str) -> None:
    matrix = with_spectrum(_DECAYING, dtype=torch.float32)
    operator = _Rounding(matrix)
    result = eigsh(operator, 12, method=method, tol=2e-6)
    assert result.measured  # since the bounds did not meet the tolerance
    assert operator.products == result.products
    assert "stagnated" in result.status
    true = _true(matrix, result)
    assert (result.residuals >= 0.3 * true).all()
    assert float(result.residuals.max()) > 2e-6 * 90
    # Of a looser tolerance three products tell that it is met all the same.
    loose = eigsh(operator, 12, method=method, tol=1e-2)
    assert not loose.measured
    assert loose.converged.all()
    assert (_true(matrix, loose) <= loose.residuals).all()


def test_the_budget_may_not_suffice_to_measure() -> None:
    matrix = with_spectrum(_DECAYING, dtype=torch.float32)
    needed = eigsh(_Rounding(matrix), 12, tol=2e-6).products
    result = eigsh(_Rounding(matrix), 12, tol=2e-6, max_products=needed - 1)
    assert not result.measured
    assert result.products == needed - (12 - CHECKS)
    assert result.ended == "limit"
    assert "limit" in result.status
    assert (_true(matrix, result) <= result.residuals).all()


@pytest.mark.parametrize("size", [5, 6, 20])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_bound_fails_rarely_whatever_the_error(size: int, rank: int) -> None:
    generator = make_generator(size * rank, "test")
    error = np.random.default_rng(rank).standard_normal((rank, size))
    error /= np.linalg.norm(error)
    draws = 4000
    bounds = [
        error_bound(float(np.linalg.norm(error @ random_frame(size, generator)[:, :CHECKS])), size)
        for _ in range(draws)
    ]
    failed = float((np.array(bounds) < 1.0).mean())
    assert failed <= 0.017  # 1 %, and five standard deviations
    if rank == 1:
        assert failed >= 0.004  # no larger than it has to be
    assert float(np.median(bounds)) < 25


def test_frames_are_orthogonal_matrices() -> None:
    frame = random_frame(7, make_generator(0, "test"))
    np.testing.assert_allclose(frame @ frame.T, np.eye(7), atol=1e-14)


def test_a_network_in_float32() -> None:
    case = make_case("convnet", torch.float32)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    options: dict[str, Any] = {"tol": 1e-3, "seed": 3}
    result = eigsh(operator, 8, **options)
    dense = operator.to_dense().double()
    assert not result.measured
    assert result.converged.all()
    assert (_true(dense, result) <= result.residuals.double() + 1e-6 * float(result.values[0].abs())).all()
