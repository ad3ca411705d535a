from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import brentq

from kronfac.linalg import cubic_regularised
from tests.linalg.matrices import Counted, with_spectrum

Array = npt.NDArray[np.float64]
SIZE = 40
INDEFINITE = with_spectrum(np.r_[np.linspace(-3, -0.5, 10), np.linspace(0.1, 5, SIZE - 10)])


def vector(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, kind: str, largest: int) -> tuple[Array, Array, float]:
    """H, g and σ. "hard": g has no part along the lowest eigenvector, which the minimiser needs; "saddle": g = 0."""
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, largest + 1))
    values = 10 ** generator.uniform(-2, 1, size)
    if kind != "convex":
        values[: generator.integers(1, size)] *= -1
    matrix = with_spectrum(values, seed=seed).numpy()
    gradient = generator.standard_normal(size) * 10 ** generator.uniform(-4, 3)
    sigma = 10 ** generator.uniform(-3, 3)
    if kind == "hard":
        lowest = np.linalg.eigh(matrix)[1][:, 0]
        gradient -= lowest * (lowest @ gradient)
        shifted = np.linalg.pinv(matrix - values.min() * np.eye(size), rcond=1e-10) @ gradient
        sigma = float(-values.min() / np.linalg.norm(shifted) / generator.uniform(1.1, 10))
    elif kind == "saddle":
        gradient *= 0
    return matrix, gradient, sigma


def model(matrix: Array, gradient: Array, sigma: float, step: Array) -> float:
    return float(gradient @ step + 0.5 * step @ matrix @ step + sigma / 3 * np.linalg.norm(step) ** 3)


def dense_solution(matrix: Array, gradient: Array, sigma: float) -> tuple[Array, float]:
    """The global minimiser (Nesterov & Polyak 2006), by eigenvalues and the secular equation, and its part in ±u."""
    values, vectors = np.linalg.eigh(matrix)
    c = vectors.T @ gradient
    bound = max(0.0, -values[0])
    gaps = values + bound

    def excess(shift: float) -> float:
        return float(np.linalg.norm(c / (gaps + shift)) - (bound + shift) / sigma)

    least = 1e-12 * float(np.abs(values).max())
    if bound > 0 and excess(least) <= 0:
        safe = gaps > least
        y = np.where(safe, -c / np.where(safe, gaps, 1.0), 0.0)
        missing = math.sqrt((bound / sigma) ** 2 - float(y @ y))
        return vectors @ y, missing
    most = 1.0
    while excess(most) > 0:
        most *= 2
    least = least if bound > 0 else 1e-18
    shift = brentq(excess, least, most, xtol=1e-300, rtol=1e-14)
    return -vectors @ (c / (gaps + shift)), 0.0


@pytest.mark.parametrize("kind", ["convex", "indefinite", "hard", "saddle"])
def test_random_problems_against_the_dense_minimiser(kind: str) -> None:
    hard = kind in ("hard", "saddle")
    for seed in range(50):
        matrix, gradient, sigma = problem(seed, kind, 200 if seed == 0 else 40)
        operator = Counted(torch.from_numpy(matrix))
        result = cubic_regularised(
            operator, torch.from_numpy(gradient), sigma, tolerance=1e-12, max_iterations=250, explore=hard
        )
        assert result.converged
        assert result.products == operator.products == result.iterations <= len(gradient)
        expected, missing = dense_solution(matrix, gradient, sigma)
        lowest = np.linalg.eigh(matrix)[1][:, 0]
        assert (missing > 0) == hard
        step = result.step.numpy()
        length = math.hypot(float(np.linalg.norm(expected)), missing)
        if hard:  # both signs along the lowest eigenvector are minimisers
            sign = math.copysign(1.0, float(lowest @ step))
            expected = expected + sign * missing * lowest
        np.testing.assert_allclose(step, expected, rtol=0, atol=1e-6 * length)
        assert result.norm == pytest.approx(length, rel=1e-6)
        assert result.shift == pytest.approx(sigma * length, rel=1e-6)
        best = model(matrix, gradient, sigma, expected)
        assert model(matrix, gradient, sigma, step) == pytest.approx(best, rel=1e-6)
        assert result.model_decrease == pytest.approx(-best, rel=1e-6)
        least = float(np.linalg.eigvalsh(matrix)[0])
        assert result.lowest >= least - 1e-9
        assert result.lowest + result.shift >= -1e-9
        if kind != "convex":
            assert least + result.shift >= -1e-6 * abs(least)


def test_a_krylov_space_of_the_gradient_misses_what_is_orthogonal_to_it() -> None:
    for seed in range(5):
        matrix, gradient, sigma = problem(seed, "hard", 30)
        H, g = torch.from_numpy(matrix), torch.from_numpy(gradient)
        seen = cubic_regularised(H, g, sigma, tolerance=1e-8, explore=True)
        blind = cubic_regularised(H, g, sigma, tolerance=1e-8, max_iterations=len(g) - 1)
        assert seen.model_decrease > blind.model_decrease
        assert seen.lowest == pytest.approx(float(np.linalg.eigvalsh(matrix)[0]), rel=1e-6)


def test_exploring_stops_where_nothing_is_to_be_found() -> None:
    matrix, g = with_spectrum(np.linspace(1, 10, 200)), vector(size=200)
    plain = cubic_regularised(matrix, g, 1.0, tolerance=1e-4)
    explored = [cubic_regularised(matrix, g, 1.0, tolerance=1e-4, explore=True, seed=seed) for seed in (0, 1, 1)]
    for result in explored:
        assert plain.products < result.products <= plain.products + 40
        torch.testing.assert_close(result.step, plain.step, rtol=0, atol=1e-3)
    assert torch.equal(explored[1].step, explored[2].step)
    assert not torch.equal(explored[0].step, explored[1].step)


@pytest.mark.parametrize("explore", [False, True])
def test_the_gradient_of_the_model_is_what_the_result_says(explore: bool) -> None:
    g = vector()
    for limit in (1, 2, 5, 12, 30):
        sizes: list[tuple[int, float]] = []
        result = cubic_regularised(
            INDEFINITE,
            g,
            0.3,
            tolerance=1e-3 if explore else 1e-10,
            max_iterations=limit,
            explore=explore,
            progress=lambda *row, sizes=sizes: sizes.append(row),
        )
        step = result.step
        measured = float((g + INDEFINITE @ step + 0.3 * step.norm() * step).norm())
        assert result.residual == pytest.approx(measured, rel=1e-6, abs=1e-10)
        assert [count for count, _ in sizes] == list(range(1, result.iterations + 1))
        assert sizes[-1][1] == result.residual
        assert result.model_decrease == pytest.approx(-model(INDEFINITE.numpy(), g.numpy(), 0.3, step.numpy()))
        assert result.norm == pytest.approx(float(step.norm()))
        if limit <= 5:
            assert (result.status, result.iterations) == ("iteration_limit", limit)


def test_default_tolerance() -> None:
    matrix = with_spectrum(np.geomspace(0.1, 10, SIZE))
    for length, relative in ((1e-4, 1e-2), (100.0, 0.5)):
        g = vector() / vector().norm() * length
        result = cubic_regularised(matrix, g, 1.0)
        assert result.converged
        assert result.residual <= relative * max(length, result.shift * result.norm)
        shorter = cubic_regularised(matrix, g, 1.0, max_iterations=max(result.iterations - 1, 1))
        assert result.iterations == 1 or not shorter.converged


@pytest.mark.parametrize("explore", [False, True])
def test_another_sigma_goes_on_from_the_same_space(explore: bool) -> None:
    g = vector()
    operator = Counted(INDEFINITE)
    options: dict[str, Any] = {"tolerance": 1e-8, "explore": explore}
    first = cubic_regularised(operator, g, 0.5, keep=True, **options)
    before = operator.products
    assert first.regularised(0.5).products == 0
    for sigma in (1.0, 100.0, 0.01):
        again = first.regularised(sigma)
        anew = cubic_regularised(INDEFINITE, g, sigma, **options)
        assert again.converged
        assert again.sigma == sigma
        if not explore:
            assert again.products <= max(anew.products - first.products, 0)
        torch.testing.assert_close(again.step, anew.step, rtol=0, atol=1e-5 * anew.norm)
        before += again.products
        assert operator.products == before
    with pytest.raises(ValueError, match="call cubic_regularised with keep=True"):
        cubic_regularised(INDEFINITE, g, 0.5).regularised(1.0)
    with pytest.raises(ValueError, match="sigma: expected a finite number greater than 0"):
        first.regularised(0.0)


def test_zero_gradient() -> None:
    zero = torch.zeros(SIZE, dtype=torch.float64)
    result = cubic_regularised(INDEFINITE, zero, 1.0, keep=True)
    assert (result.status, result.products, result.norm, result.model_decrease) == ("converged", 0, 0.0, 0.0)
    assert math.isnan(result.lowest)
    assert result.step.count_nonzero() == 0
    assert result.regularised(2.0).products == 0
    convex = cubic_regularised(with_spectrum(np.linspace(1, 3, SIZE)), zero, 1.0, explore=True)
    assert (convex.status, convex.norm) == ("converged", 0.0)
    assert convex.step.count_nonzero() == 0
    assert 0 < convex.products < SIZE
    saddle = cubic_regularised(INDEFINITE, zero, 2.0, explore=True, tolerance=1e-5)
    assert saddle.model_decrease == pytest.approx(27 / 24)  # |λ|³ / 6σ²
    assert cubic_regularised(INDEFINITE, zero, 2.0, explore=True).model_decrease > 0.1


def test_multiple_eigenvalues_and_flat_models() -> None:
    g = vector()
    for value, sigma in ((-2.0, 1.0), (0.0, 3.0), (5.0, 0.1)):
        matrix = value * torch.eye(SIZE, dtype=torch.float64)
        for explore in (False, True):
            result = cubic_regularised(matrix, g, sigma, tolerance=1e-10, explore=explore)
            assert result.converged
            # σ‖s‖² + value ‖s‖ = ‖g‖ along -g
            length = (-value + math.sqrt(value**2 + 4 * sigma * float(g.norm()))) / (2 * sigma)
            torch.testing.assert_close(result.step, -length * g / g.norm())


def test_float32_says_what_round_off_allows() -> None:
    matrix, g = with_spectrum(np.geomspace(1e-3, 10, SIZE)), vector()
    exact = cubic_regularised(matrix, g, 1e-4, tolerance=1e-12)
    rounded = cubic_regularised(matrix.float(), g.float(), 1e-4, tolerance=1e-12)
    assert rounded.status == "stagnated"
    assert rounded.step.dtype == torch.float32
    torch.testing.assert_close(rounded.step.double(), exact.step, rtol=0, atol=1e-2 * exact.norm)
    assert cubic_regularised(matrix.float(), g.float(), 1e-2, tolerance=1e-2).converged
    tiny = cubic_regularised(matrix.float(), g.float() * 1e-30, 1e-4, tolerance=1e-2)
    assert tiny.converged
    assert tiny.model_decrease > 0


def test_refusals() -> None:
    g = vector()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"gradient": g[:2]}, ValueError, r"cubic_regularised: gradient: expected shape \(40,\)"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a finite number greater than 0, got 0.0"),
        ({"sigma": math.inf}, ValueError, "sigma: expected a finite number"),
        ({"sigma": None}, TypeError, "sigma: expected a number"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a finite number greater than 0"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected at least 1"),
        ({"explore": 1}, TypeError, "explore: expected True or False"),
        ({"keep": None}, TypeError, "keep: expected True or False"),
        ({"seed": -1}, ValueError, "seed: expected an integer"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            cubic_regularised(INDEFINITE, **{"gradient": g, "sigma": 1.0, **options})
    skew = Counted(INDEFINITE + torch.triu(torch.ones(SIZE, SIZE, dtype=torch.float64)))
    with pytest.raises(ValueError, match="cubic_regularised: op: not symmetric"):
        cubic_regularised(skew, g, 1.0, tolerance=1e-8)
