from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.linalg import damped
from kronfac.linalg.damped import damped_inverses, eigenbases, factored_damping


def spd(n: int, *, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    root = torch.randn(2 * n, n, dtype=torch.float64)
    return (root.T @ root * (scale / n)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factored_damping_is_the_papers_formula(dtype: torch.dtype) -> None:
    A, G = [spd(4, dtype=dtype, scale=9.0), spd(2, dtype=dtype)], [spd(3, dtype=dtype), spd(5, dtype=dtype, scale=0.01)]
    damping = torch.tensor([0.3, 1e-4], dtype=dtype)
    right, left = factored_damping(A, G, damping)
    for i, (a, g) in enumerate(zip(A, G, strict=True)):
        pi = math.sqrt((float(a.trace()) / len(a)) / (float(g.trace()) / len(g)))
        assert float(right[i]) == pytest.approx(pi * math.sqrt(float(damping[i])), rel=1e-5)
        assert float(left[i]) == pytest.approx(math.sqrt(float(damping[i])) / pi, rel=1e-5)


@given(
    a=st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e8, 3e38]),
    g=st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e8, 3e38]),
    damping=st.floats(1e-12, 1e3),
)
def test_the_two_dampings_multiply_to_lambda_even_for_vanishing_factors(a: float, g: float, damping: float) -> None:
    right, left = factored_damping([torch.eye(3) * a], [torch.eye(2) * g], torch.tensor([damping]))
    assert torch.isfinite(right).all()
    assert torch.isfinite(left).all()
    assert float(right.double() * left.double()) == pytest.approx(damping, rel=1e-4)
    assert float(right) > 0
    assert float(left) > 0


def test_factored_damping_of_nothing_and_of_uneven_lists() -> None:
    right, left = factored_damping([], [], torch.zeros(0))
    assert right.shape == left.shape == (0,)
    with pytest.raises(ValueError, match="same number of layers, got 1, 0 and 1"):
        factored_damping([torch.eye(2)], [], torch.ones(1))


def test_inverses_of_good_factors_need_no_retry() -> None:
    factors = [spd(3), spd(6), spd(1)]
    damping = torch.tensor([1e-3, 0.5, 2.0], dtype=torch.float64)
    result = damped_inverses(factors, damping)
    assert result.retried == 0
    for factor, value, inverse in zip(factors, damping, result.values, strict=True):
        assert inverse is not None
        torch.testing.assert_close(
            inverse, torch.linalg.inv(factor + value * torch.eye(len(factor))), rtol=1e-9, atol=0
        )
    assert damped_inverses([], torch.zeros(0)).values == []


def test_an_indefinite_factor_is_retried_with_ten_times_the_damping() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -0.05], dtype=torch.float64))
    neighbour = spd(3)
    result = damped_inverses([indefinite, neighbour], torch.tensor([0.01, 0.02], dtype=torch.float64))
    assert result.retried == 1
    retried, untouched = result.values
    assert retried is not None
    assert untouched is not None
    # 0.01 leaves it indefinite, 0.1 is the first multiple that does not.
    torch.testing.assert_close(retried, torch.linalg.inv(indefinite + 0.1 * torch.eye(2)))
    torch.testing.assert_close(untouched, torch.linalg.inv(neighbour + 0.02 * torch.eye(3)))


def test_a_damping_far_below_rounding_still_comes_to_an_end() -> None:
    vector = torch.tensor([[3.0, 5.0, 7.0, 11.0]])
    singular = vector.T @ vector - 1e-5 * torch.eye(4)  # slightly indefinite, as rounding makes it
    (inverse,) = damped_inverses([singular], torch.tensor([1e-30])).values
    assert inverse is not None
    assert torch.isfinite(inverse).all()
    assert float(torch.linalg.eigvalsh(inverse.double()).min()) > 0


def test_a_hopeless_factor_is_given_up_on_without_an_error_and_without_spoiling_others() -> None:
    hopeless = torch.diag(torch.tensor([1.0, -1e6]))
    broken = torch.full((3, 3), float("nan"))
    fine = spd(2, dtype=torch.float32)
    result = damped_inverses([hopeless, broken, fine], torch.full((3,), 1e-3))
    assert result.values[0] is None
    assert result.values[1] is None
    assert result.values[2] is not None
    assert result.retried == 2


def test_an_inverse_that_overflows_counts_as_failed() -> None:
    result = damped_inverses([torch.zeros(2, 2)], torch.tensor([1e-39]))
    (inverse,) = result.values
    assert inverse is None or torch.isfinite(inverse).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenbases_diagonalise(dtype: torch.dtype) -> None:
    factors = [spd(5, dtype=dtype), spd(2, dtype=dtype), spd(1, dtype=dtype)]
    result = eigenbases(factors)
    assert result.retried == 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for factor, pair in zip(factors, result.values, strict=True):
        assert pair is not None
        values, vectors = pair
        assert values.dtype == vectors.dtype == dtype
        torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, factor, rtol=tolerance, atol=tolerance)
    assert eigenbases([]).values == []


def test_eigenvalues_below_rounding_are_raised_to_it() -> None:
    vector = torch.tensor([[1.0, 2.0, 3.0]])
    (pair,) = eigenbases([vector.T @ vector]).values
    assert pair is not None
    values, _ = pair
    assert float(values[0]) >= float(values[-1]) * torch.finfo(torch.float32).eps


def test_an_eigensolver_that_fails_is_retried_with_a_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    real, shifts, dtypes = damped.ops.damped_eigh, [], []

    def stubborn(factors, damping, basis=None):  # type: ignore[no-untyped-def]
        values, vectors, info = real(factors, damping, basis)
        shifts.append(damping.tolist())
        dtypes.append(factors[0].dtype)
        return values, vectors, torch.where(damping < 1e-5, 1, info).to(torch.int32)

    monkeypatch.setattr(damped.ops, "damped_eigh", stubborn)
    factor = spd(4, dtype=torch.float32)
    result = eigenbases([factor])
    assert result.retried == 1
    assert shifts[0] == [0.0]
    assert len(shifts) > 1
    (pair,) = result.values
    assert pair is not None
    values, vectors = pair
    assert dtypes[:2] == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    rebuilt = vectors @ torch.diag(values) @ vectors.T
    torch.testing.assert_close(rebuilt, factor + shifts[-1][0] * torch.eye(4), rtol=1e-4, atol=1e-5)


def test_a_factor_without_eigenbasis_is_given_up_on() -> None:
    fine, broken = spd(3, dtype=torch.float32), torch.full((2, 2), float("inf"))
    result = eigenbases([broken, fine])
    assert result.values[0] is None
    assert result.values[1] is not None
