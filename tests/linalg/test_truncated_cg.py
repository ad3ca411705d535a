"""Conjugate gradients of Hessian-free optimization against dense solutions and a textbook recursion in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.linalg.truncated_cg import truncated_cg


def problem(size: int, seed: int, lowest: float = 0.1) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with eigenvalues from `lowest` to 10, and a gradient."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    values = np.linspace(lowest, 10.0, size)
    matrix = torch.from_numpy(basis @ np.diag(values) @ basis.T)
    return (matrix + matrix.mT) / 2, torch.from_numpy(rng.standard_normal(size))


def textbook(matrix: Tensor, g: Tensor, count: int) -> list[np.ndarray]:
    """The iterates of Hestenes & Stiefel on A s = -g from zero, up to a direction of non-positive curvature."""
    A, b = matrix.numpy(), -g.numpy()
    s, r = np.zeros_like(b), b.copy()
    p, found = r.copy(), [np.zeros_like(b)]
    for _ in range(count):
        curvature = p @ A @ p
        if curvature <= 0:
            break
        alpha = r @ r / curvature
        s = s + alpha * p
        following = r - alpha * (A @ p)
        p = following + (following @ following) / (r @ r) * p
        r = following
        found.append(s)
    return found


def model(matrix: Tensor, g: Tensor, s: Tensor) -> float:
    return float(g @ s + 0.5 * s @ matrix @ s)


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    shift=st.sampled_from([0.0, 0.3, 20.0]),
    warm=st.booleans(),
    preconditioned=st.booleans(),
)
def test_solves_to_the_tolerance(size: int, seed: int, shift: float, warm: bool, preconditioned: bool) -> None:
    matrix, g = problem(size, seed)
    damped = matrix + shift * torch.eye(size, dtype=torch.float64)
    exact = torch.linalg.solve(damped, -g)
    result = truncated_cg(
        matrix,
        g,
        shift=shift,
        start=exact * 0.7 if warm else None,
        tolerance=1e-10,
        max_iterations=10 * size + 20,
        preconditioner=torch.diag(1 / damped.diagonal()) if preconditioned else None,
        keep=True,
    )
    assert result.status == "converged"
    assert result.warm == warm
    torch.testing.assert_close(result.iterates[-1].step, exact, rtol=1e-7, atol=1e-8)
    assert result.products == result.iterations + warm
    values = [model(damped, g, each.step) for each in result.iterates]
    assert all(later <= earlier + 1e-12 for earlier, later in zip([0.0, *values], values, strict=False))
    for each in result.iterates:
        assert each.slope == pytest.approx(float(g @ each.step), rel=1e-9, abs=1e-12)
        assert each.curvature == pytest.approx(float(each.step @ matrix @ each.step), rel=1e-7, abs=1e-10)
        assert each.model_decrease == pytest.approx(-model(matrix, g, each.step), rel=1e-7, abs=1e-10)


def test_a_perfect_preconditioner_takes_one_iteration() -> None:
    matrix, g = problem(20, 0)
    inverse = torch.linalg.inv(matrix + 0.5 * torch.eye(20, dtype=torch.float64))
    for preconditioner in (inverse, lambda vector: inverse @ vector):
        result = truncated_cg(matrix, g, shift=0.5, tolerance=1e-9, preconditioner=preconditioner)
        assert (result.status, result.iterations) == ("converged", 1)


@pytest.mark.parametrize("lowest", [1e-4, 1e-2, 1.0])
def test_stops_where_martens_rule_says(lowest: float) -> None:
    matrix, g = problem(60, 3, lowest)
    iterates = [torch.from_numpy(s) for s in textbook(matrix, g, 60)]
    values = [model(matrix, g, s) for s in iterates]
    expected = next(
        i
        for i in range(1, len(values))
        if (k := max(10, math.ceil(i / 10))) < i and (values[i] - values[i - k]) / values[i] < k * 5e-4
    )
    result = truncated_cg(matrix, g)
    assert result.status == "little_progress"
    assert result.iterations == expected
    torch.testing.assert_close(result.iterates[-1].step, iterates[expected], rtol=1e-6, atol=1e-8)


def test_keeps_iterates_at_growing_distances() -> None:
    matrix, g = problem(60, 3, 1e-4)
    iterates = textbook(matrix, g, 30)
    result = truncated_cg(matrix, g, tolerance=1e-12, max_iterations=30, keep=True)
    assert result.status == "iteration_limit"
    assert [each.iteration for each in result.iterates] == [1, 2, 3, 4, 6, 8, 11, 15, 20, 26, 30]
    for each in result.iterates:
        torch.testing.assert_close(each.step, torch.from_numpy(iterates[each.iteration]), rtol=1e-6, atol=1e-8)
    alone = truncated_cg(matrix, g, tolerance=1e-12, max_iterations=30)
    assert len(alone.iterates) == 1
    assert torch.equal(alone.iterates[0].step, result.iterates[-1].step)


@pytest.mark.parametrize("seed", range(8))
def test_ends_before_a_direction_of_nonpositive_curvature(seed: int) -> None:
    matrix, g = problem(25, seed, lowest=-2.0)
    iterates = textbook(matrix, g, 25)
    result = truncated_cg(matrix, g, tolerance=1e-10)
    assert result.status == "nonpositive_curvature"
    assert result.iterations == len(iterates) - 1
    torch.testing.assert_close(result.iterates[-1].step, torch.from_numpy(iterates[-1]), rtol=1e-6, atol=1e-8)
    p = result.direction
    assert p is not None
    assert float(p @ matrix @ p) <= 0
    assert result.rayleigh == pytest.approx(float(p @ matrix @ p / (p @ p)))
    # enough damping, and the same system is solved
    more = truncated_cg(matrix, g, shift=2.1, tolerance=1e-10)
    assert more.status == "converged"


def test_nothing_to_begin_with() -> None:
    matrix, g = problem(6, 1)
    empty = truncated_cg(-matrix, g, shift=0.01)
    assert (empty.iterates, empty.status, empty.iterations, empty.products) == ((), "nonpositive_curvature", 0, 1)
    assert empty.rayleigh == pytest.approx(float(-g @ matrix @ g / (g @ g)))
    zero = truncated_cg(matrix, torch.zeros_like(g))
    assert (zero.iterates, zero.status, zero.products) == ((), "converged", 0)


def test_a_bad_start_is_dropped() -> None:
    matrix, g = problem(10, 2)
    cold = truncated_cg(matrix, g, tolerance=1e-8)
    uphill = truncated_cg(matrix, g, start=g, tolerance=1e-8)
    assert not uphill.warm
    assert uphill.products == cold.products + 1
    assert torch.equal(uphill.iterates[-1].step, cold.iterates[-1].step)
    assert not truncated_cg(-matrix, g, start=-g).warm  # downhill, but along a concave line
    solved = truncated_cg(matrix, g, start=torch.linalg.solve(matrix, -g), tolerance=1e-8)
    assert (solved.status, solved.iterations, solved.iterates[0].iteration) == ("converged", 0, 0)


def test_a_start_that_is_too_long_is_shortened() -> None:
    matrix, g = problem(10, 2)
    exact = torch.linalg.solve(matrix, -g)
    solved = truncated_cg(matrix, g, start=5 * exact, tolerance=1e-8)
    assert (solved.warm, solved.status, solved.iterations) == (True, "converged", 0)
    torch.testing.assert_close(solved.iterates[0].step, exact)
    along = 3 * exact + torch.linspace(-0.1, 0.1, 10, dtype=torch.float64)
    first = truncated_cg(matrix, g, start=along, tolerance=1e-8, keep=True).iterates[0].step
    best = -float(g @ along) / float(along @ matrix @ along)
    assert 0 < best < 1
    torch.testing.assert_close(first, best * along)


def test_tiny_gradients_in_float32() -> None:
    matrix, g = problem(12, 5)
    whole = truncated_cg(matrix.float(), g.float(), tolerance=1e-5)
    tiny = truncated_cg(matrix.float(), g.float() * 1e-25, tolerance=1e-5)
    assert tiny.iterations == whole.iterations
    torch.testing.assert_close(tiny.iterates[-1].step * 1e25, whole.iterates[-1].step, rtol=1e-3, atol=1e-5)


def test_refusals() -> None:
    matrix, g = problem(4, 0)
    with pytest.raises(ValueError, match="start: expected shape"):
        truncated_cg(matrix, g, start=g[:2])
    with pytest.raises(ValueError, match="max_iterations: expected at least 1"):
        truncated_cg(matrix, g, max_iterations=0)
    with pytest.raises(ValueError, match="preconditioner: expected a positive definite"):
        truncated_cg(matrix, g, preconditioner=-matrix)
    with pytest.raises(ValueError, match="gradient: expected finite"):
        truncated_cg(matrix, g * math.nan)
