from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronfac.linalg import cg, cg_shifts, minres
from kronfac.operators import ggn
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import make_case

SIZE = 40
POSITIVE = with_spectrum(np.geomspace(1e-2, 10, SIZE))
INDEFINITE = with_spectrum(np.r_[np.linspace(-3, -0.5, 10), np.linspace(0.1, 5, SIZE - 10)])


def right_side(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def solution(matrix: torch.Tensor, b: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    return torch.linalg.solve(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype), b)


@pytest.mark.parametrize("solve", [cg, minres])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_positive_definite(solve: Any, shift: float) -> None:
    operator, b = Counted(POSITIVE), right_side()
    result = solve(operator, b, shift=shift, tolerance=1e-10)
    assert result.converged
    assert result.residual <= 1e-10
    torch.testing.assert_close(result.x, solution(POSITIVE, b, shift), rtol=1e-7, atol=1e-7)
    assert result.products == operator.products
    measured = (b - POSITIVE @ result.x - shift * result.x).norm() / b.norm()
    assert result.residual == pytest.approx(float(measured), rel=1e-3)


def test_minres_on_an_indefinite_matrix() -> None:
    b = right_side()
    result = minres(INDEFINITE, b, tolerance=1e-10, max_iterations=200)
    assert result.converged
    torch.testing.assert_close(result.x, solution(INDEFINITE, b), rtol=1e-7, atol=1e-7)


def test_minres_residuals_are_the_least_over_the_krylov_space() -> None:
    b = right_side()
    for steps in (1, 3, 8):
        result = minres(INDEFINITE, b, max_iterations=steps, tolerance=1e-14)
        krylov = [b]
        for _ in range(steps - 1):
            krylov.append(INDEFINITE @ krylov[-1])
        basis = torch.linalg.qr(torch.stack(krylov, 1))[0]
        least = torch.linalg.lstsq(INDEFINITE @ basis, b[:, None]).solution
        expected = (b - INDEFINITE @ (basis @ least)[:, 0]).norm() / b.norm()
        assert result.status == "iteration_limit"
        assert result.residual == pytest.approx(float(expected), rel=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 25),
    st.integers(0, 10_000),
    st.sampled_from(["positive", "semidefinite", "indefinite", "negative"]),
)
def test_minres_sees_nonpositive_curvature_exactly_when_the_dense_matrix_has_it(
    size: int, seed: int, kind: str
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.uniform(0.1, 3, size)
    if kind == "semidefinite":
        values[0] = 0.0
    elif kind == "indefinite":
        values[: max(1, size // 3)] *= -1
    elif kind == "negative":
        values *= -1
    matrix = with_spectrum(values, seed=seed)
    b = torch.tensor(generator.standard_normal(size))
    result = minres(matrix, b, tolerance=1e-12, stop_at_nonpositive_curvature=True, reorthogonalize=True)
    if kind == "positive":
        assert result.converged
        torch.testing.assert_close(result.x, solution(matrix, b), rtol=1e-6, atol=1e-6)
    else:
        assert result.status == "nonpositive_curvature"
        assert result.direction is not None
        curvature = float(result.direction @ matrix @ result.direction) / float(result.direction.square().sum())
        assert curvature <= 1e-8
        # and not a step earlier: the residuals before it had positive curvature, so x is the minimiser over them
        torch.testing.assert_close(result.direction, b - matrix @ result.x, rtol=1e-7, atol=1e-7)


def test_minres_solves_inconsistent_systems_in_the_least_squares_sense() -> None:
    matrix = with_spectrum(np.r_[np.zeros(5), np.linspace(-2, 3, SIZE - 5)])
    b = right_side()
    for tolerance, reorthogonalize in ((1e-8, False), (1e-12, True)):
        result = minres(matrix, b, relative_to="solution", tolerance=tolerance, reorthogonalize=reorthogonalize)
        assert result.converged
        change = float((matrix @ (b - matrix @ result.x)).norm() / (matrix @ result.x).norm())
        assert change <= 2 * tolerance
    lost = minres(matrix, b, relative_to="solution", tolerance=1e-14, max_iterations=200)
    assert lost.status == "stagnated"
    assert float(lost.x.norm()) < 2 * float(result.x.norm())
    assert minres(matrix, b, tolerance=1e-9, max_iterations=200).status in ("stagnated", "iteration_limit")


def test_cg_stops_at_nonpositive_curvature_and_shows_it() -> None:
    result = cg(INDEFINITE, right_side())
    assert result.status == "nonpositive_curvature"
    assert result.direction is not None
    assert float(result.direction @ INDEFINITE @ result.direction) <= 0
    assert not result.converged
    assert cg(torch.zeros(SIZE, SIZE), right_side(dtype=torch.float32)).status == "nonpositive_curvature"


def test_a_preconditioner_saves_iterations() -> None:
    scales = torch.tensor(np.geomspace(1e-3, 1e3, SIZE))
    matrix = scales[:, None].sqrt() * with_spectrum(np.linspace(1, 3, SIZE)) * scales.sqrt()
    matrix = (matrix + matrix.mT) / 2
    b = right_side()
    plain = cg(matrix, b, tolerance=1e-8, max_iterations=2000)
    for preconditioner in (torch.diag(1 / scales), lambda r: r / scales):
        helped = cg(matrix, b, tolerance=1e-8, preconditioner=preconditioner)
        assert helped.converged
        assert helped.iterations < plain.iterations / 2
        torch.testing.assert_close(matrix @ helped.x, b, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expected a positive definite one"):
        cg(matrix, b, preconditioner=lambda r: -r)
    with pytest.raises(ValueError, match="preconditioner: expected a finite tensor of shape"):
        cg(matrix, b, preconditioner=lambda r: r[:2])


def test_start_limit_and_zero_right_side() -> None:
    b = right_side()
    exact = solution(POSITIVE, b)
    assert cg(POSITIVE, b, x0=exact, tolerance=1e-10).iterations == 0
    calls: list[tuple[int, float]] = []
    limited = cg(POSITIVE, b, max_iterations=3, progress=lambda done, size: calls.append((done, size)))
    assert (limited.status, limited.iterations, len(calls)) == ("iteration_limit", 3, 3)
    for solve in (cg, minres):
        nothing = solve(POSITIVE, torch.zeros(SIZE, dtype=torch.float64))
        assert nothing.converged
        assert nothing.residual == 0
        assert nothing.x.count_nonzero() == 0


@pytest.mark.parametrize("solve", [cg, minres])
def test_an_impossible_tolerance_is_not_called_converged(solve: Any) -> None:
    matrix = with_spectrum(np.geomspace(1e-4, 1, SIZE), dtype=torch.float32)
    result = solve(matrix, right_side(dtype=torch.float32), tolerance=1e-12, max_iterations=500)
    assert not result.converged
    assert result.residual > 1e-12


def test_all_shifts_from_one_krylov_space() -> None:
    b, shifts = right_side(), [1.0, 0.0, 0.01, 30.0]
    operator = Counted(POSITIVE)
    results = cg_shifts(operator, b, shifts, tolerance=1e-9, max_iterations=300)
    alone = cg(POSITIVE, b, tolerance=1e-9, max_iterations=300)
    assert operator.products == results[0].products <= alone.products + len(shifts) + 2
    for shift, result in zip(shifts, results, strict=True):
        assert result.converged
        torch.testing.assert_close(result.x, solution(POSITIVE, b, shift), rtol=1e-6, atol=1e-6)
    negative = cg_shifts(INDEFINITE, b, [0.0, 4.0])
    assert negative[0].status == "nonpositive_curvature"
    assert [r.converged for r in cg_shifts(POSITIVE, torch.zeros_like(b), [0.0, 1.0])] == [True, True]


def test_damped_gauss_newton_step_of_a_network() -> None:
    case = make_case("mlp")
    operator = ggn(case.model, case.loss_fn, (case.inputs, case.targets))
    b = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = cg(operator, b, shift=1e-3, tolerance=1e-9)
    assert result.converged
    torch.testing.assert_close(result.x, solution(operator.to_dense(), b, 1e-3), rtol=1e-6, atol=1e-6)


def test_refusals() -> None:
    b = right_side()
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (cg, {"b": b.float()}, TypeError, "b: expected torch.float64, got torch.float32"),
        (cg, {"b": b[:3]}, ValueError, r"b: expected shape \(40,\) on cpu, got \(3,\)"),
        (cg, {"b": b * float("nan")}, ValueError, "b: expected finite values"),
        (cg, {"tolerance": 0.0}, ValueError, "tolerance: expected a finite number greater than 0"),
        (cg, {"max_iterations": 0}, ValueError, "max_iterations: expected at least 1"),
        (cg, {"shift": "1"}, TypeError, "shift: expected a number"),
        (cg, {"preconditioner": 3}, TypeError, "preconditioner: expected an operator"),
        (cg, {"x0": b[:2]}, ValueError, "x0: expected shape"),
        (minres, {"relative_to": "x"}, ValueError, "relative_to: expected 'b' or 'solution'"),
        (cg_shifts, {"shifts": []}, TypeError, "shifts: expected a list of at least one number"),
    ]
    for solve, options, error, match in cases:
        arguments = {"b": b, **({"shifts": [0.0]} if solve is cg_shifts else {}), **options}
        with pytest.raises(error, match=match):
            solve(POSITIVE, **arguments)
