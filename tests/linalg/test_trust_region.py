from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import brentq

from kronfac.linalg import TrustRegionResult, trust_region_cg
from tests.linalg.matrices import Counted, with_spectrum

Array = npt.NDArray[np.float64]
SIZE = 40
KINDS = ("convex", "indefinite", "hard")


def problem(seed: int, kind: str) -> tuple[Array, Array, float]:
    """H, g and a radius, up to 200 dimensions and over many orders of magnitude."""
    generator = np.random.default_rng(seed)
    size = int(2 * 100 ** generator.uniform())
    values = 10 ** generator.uniform(-3, 2, size)
    if kind != "convex":
        values[: generator.integers(1, size)] *= -1
    matrix = with_spectrum(values, seed=seed).numpy()
    gradient = generator.standard_normal(size) * 10 ** generator.uniform(-4, 3)
    radius = 10 ** generator.uniform(-3, 2)
    if kind == "hard":
        lowest = np.linalg.eigh(matrix)[1][:, 0]
        gradient -= lowest * (lowest @ gradient)
        shifted = np.linalg.pinv(matrix - values.min() * np.eye(size), rcond=1e-10) @ gradient
        radius = float(np.linalg.norm(shifted)) * generator.uniform(1.1, 3)
    return matrix, gradient, radius


def model(matrix: Array, gradient: Array, step: Array) -> float:
    return float(gradient @ step + 0.5 * step @ matrix @ step)


def dense_solution(matrix: Array, gradient: Array, radius: float) -> Array:
    """The global minimiser of the model in the ball (Moré & Sorensen 1983), by eigenvalues and the secular equation."""
    values, vectors = np.linalg.eigh(matrix)
    c = vectors.T @ gradient
    if values[0] > 0 and np.linalg.norm(c / values) <= radius:
        inside: Array = -vectors @ (c / values)
        return inside
    bound = max(0.0, -values[0])
    gaps = values + bound

    def excess(shift: float) -> float:
        return float(1 / radius - 1 / np.linalg.norm(c / (gaps + shift)))

    least = 1e-12 * float(np.abs(values).max())
    if excess(least) <= 0:  # the hard case: what is missing comes from the lowest eigenvector
        safe = gaps > least
        y = np.where(safe, -c / np.where(safe, gaps, 1.0), 0.0)
        y[0] += math.sqrt(max(radius**2 - float(y @ y), 0.0))
        hard: Array = vectors @ y
        return hard
    shift = brentq(excess, least, float(np.linalg.norm(c)) / radius * (1 + 1e-9) + least, xtol=1e-300, rtol=1e-14)
    solution: Array = -vectors @ (c / (gaps + shift))
    return solution


def cauchy_decrease(matrix: Array, gradient: Array, radius: float, inverse: Array | None = None) -> float:
    """Of the best multiple of -M⁻¹g in the ball of the norm of M."""
    direction = -gradient if inverse is None else -inverse @ gradient
    slope = -float(gradient @ direction)
    longest = radius / math.sqrt(float(direction @ direction) if inverse is None else slope)
    curvature = float(direction @ matrix @ direction)
    length = longest if curvature <= 0 else min(longest, slope / curvature)
    return length * slope - 0.5 * length**2 * curvature


def check_step(result: TrustRegionResult, matrix: Array, gradient: Array, radius: float) -> float:
    """What holds for every result; returns the model's decrease."""
    step = result.step.numpy()
    length = float(np.linalg.norm(step))
    assert length <= radius * (1 + 1e-9)
    assert result.norm == pytest.approx(length, rel=1e-8)
    assert result.at_boundary == (result.status in ("boundary", "negative_curvature"))
    if result.at_boundary:
        assert length == pytest.approx(radius, rel=1e-6)
    decrease = -model(matrix, gradient, step)
    terms = np.linalg.norm(gradient) * length + np.abs(matrix).max() * length**2
    assert result.model_decrease == pytest.approx(decrease, rel=1e-7, abs=1e-11 * float(terms))
    assert decrease >= cauchy_decrease(matrix, gradient, radius) - 1e-11 * float(terms)
    return decrease


@pytest.mark.parametrize("kind", KINDS)
def test_random_problems_against_the_dense_solution(kind: str) -> None:
    seen = set()
    for seed in range({"convex": 200, "indefinite": 200, "hard": 100}[kind]):
        matrix, gradient, radius = problem(seed, kind)
        operator = Counted(torch.from_numpy(matrix))
        result = trust_region_cg(operator, torch.from_numpy(gradient), radius, tolerance=1e-9)
        seen.add(result.status)
        assert result.products == operator.products == result.iterations
        decrease = check_step(result, matrix, gradient, radius)
        best = -model(matrix, gradient, dense_solution(matrix, gradient, radius))
        assert decrease <= best * (1 + 1e-9)
        if kind == "convex":
            assert decrease >= 0.5 * best * (1 - 1e-9)
        if result.status == "negative_curvature":
            assert result.direction is not None
            p = result.direction.numpy()
            assert p @ matrix @ p <= 0
        else:
            assert result.direction is None
        if result.status == "interior":
            residual = np.linalg.norm(gradient + matrix @ result.step.numpy()) / np.linalg.norm(gradient)
            assert residual <= 1e-7
    assert seen >= ({"interior", "boundary"} if kind == "convex" else {"boundary", "negative_curvature"})


@pytest.mark.parametrize("kind", ["convex", "indefinite"])
def test_preconditioner_is_a_change_of_variables(kind: str) -> None:
    """With M = LLᵀ the result is Lᵀ⁻¹ times the plain one for L⁻¹HL⁻ᵀ and L⁻¹g."""
    statuses = set()
    for seed in range(12):
        values = np.geomspace(0.1, 10, SIZE)
        if kind == "indefinite":
            values[::4] *= -1
        matrix = with_spectrum(values, seed=seed).numpy()
        metric = with_spectrum(np.geomspace(0.2, 20, SIZE), seed=seed + 100).numpy()
        inverse = np.linalg.inv(metric)
        inverse = (inverse + inverse.T) / 2
        gradient = np.random.default_rng(seed).standard_normal(SIZE)
        root = np.linalg.inv(np.linalg.cholesky(metric))
        changed = root @ matrix @ root.T
        for radius in (0.1, 3.0, 300.0):
            preconditioner = torch.from_numpy(inverse)
            result = trust_region_cg(
                torch.from_numpy(matrix),
                torch.from_numpy(gradient),
                radius,
                tolerance=1e-9,
                max_iterations=10,
                preconditioner=preconditioner if seed % 2 else lambda r, M=preconditioner: M @ r,
            )
            plain = trust_region_cg(
                torch.from_numpy((changed + changed.T) / 2),
                torch.from_numpy(root @ gradient),
                radius,
                tolerance=1e-12,
                max_iterations=10,
            )
            assert (result.status, result.iterations) == (plain.status, plain.iterations)
            np.testing.assert_allclose(result.step.numpy(), root.T @ plain.step.numpy(), rtol=1e-5, atol=1e-8 * radius)
            step = result.step.numpy()
            assert result.norm == pytest.approx(math.sqrt(step @ metric @ step), rel=1e-9)
            assert result.model_decrease == pytest.approx(-model(matrix, gradient, step), rel=1e-9)
            assert result.model_decrease >= cauchy_decrease(matrix, gradient, radius, inverse) * (1 - 1e-12)
            statuses.add(result.status)
    assert statuses >= {"boundary", "negative_curvature" if kind == "indefinite" else "iteration_limit"}


def test_norm_of_the_preconditioner_survives_lost_orthogonality() -> None:
    scales = np.geomspace(1e-6, 1e6, 150)
    matrix = with_spectrum(np.geomspace(1e-7, 1e3, 150), seed=3)
    gradient = torch.randn(150, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inverse = torch.from_numpy(1 / scales)
    for radius in (1e-2, 1e2, 1e4):
        result = trust_region_cg(matrix, gradient, radius, tolerance=1e-14, preconditioner=lambda r: r * inverse)
        assert result.norm == pytest.approx(float((result.step.square() / inverse).sum().sqrt()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_radius_costs_no_product(kind: str) -> None:
    for seed in range(8):
        matrix, gradient, radius = problem(seed, kind)
        H, g = torch.from_numpy(matrix), torch.from_numpy(gradient)
        metric = torch.from_numpy(10 ** np.random.default_rng(seed).uniform(-1, 1, len(g))) if seed % 2 else None
        options: dict[str, Any] = {"tolerance": 1e-6}
        if metric is not None:
            options["preconditioner"] = torch.diag(metric)
        result = trust_region_cg(H, g, radius, keep=250, **options)
        for shrink in (0.999, 0.7, 0.5, 0.01):
            smaller = result.norm * shrink
            short, anew = result.shortened(smaller), trust_region_cg(H, g, smaller, **options)
            assert short is not None
            assert (short.status, short.iterations, short.products) == (anew.status, anew.iterations, 0)
            assert (short.norm, short.radius) == (smaller, smaller)
            torch.testing.assert_close(short.step, anew.step, rtol=1e-7, atol=1e-9 * smaller)
            assert short.model_decrease == pytest.approx(anew.model_decrease, rel=1e-7)
            assert short.residual == pytest.approx(anew.residual, rel=1e-6)
            again = short.shortened(smaller / 2)
            assert again is not None
            torch.testing.assert_close(again.step, trust_region_cg(H, g, smaller / 2, **options).step)
        larger = result.shortened(2 * result.norm)
        assert (larger is None) == result.at_boundary
        if larger is not None:
            assert (larger.radius, larger.norm, larger.products) == (2 * result.norm, result.norm, 0)


def test_only_the_last_iterates_are_kept() -> None:
    matrix = with_spectrum(np.geomspace(1e-3, 10, SIZE))
    g = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = [trust_region_cg(matrix, g, 1e9, tolerance=1e-9, max_iterations=k).norm for k in range(1, 11)]
    result = trust_region_cg(matrix, g, 1e9, tolerance=1e-9, max_iterations=10, keep=3)
    for index, (low, high) in enumerate(pairwise(norms), start=1):
        short = result.shortened((low + high) / 2)
        assert (short is not None) == (index >= 7)  # pieces 8, 9 and 10, the one from iterate 7 first
    assert trust_region_cg(matrix, g, 1e9, max_iterations=10).shortened(norms[8]) is None


def test_stopping_rules() -> None:
    matrix = with_spectrum(np.geomspace(0.1, 10, SIZE))
    unit = torch.ones(SIZE, dtype=torch.float64) / math.sqrt(SIZE)
    sizes: list[tuple[int, float]] = []
    for length, expected in ((1e-4, 1e-2), (4.0, 0.5)):
        result = trust_region_cg(matrix, unit * length, 1e3, progress=lambda *row: sizes.append(row))
        measured = float((unit * length + matrix @ result.step).norm()) / length
        assert result.residual == pytest.approx(measured, rel=1e-6)
        assert measured <= expected
        assert len(sizes) == result.iterations
        assert sizes[-1] == (result.iterations, result.residual)
        assert all(size > expected for _, size in sizes[:-1])
        sizes.clear()
    limited = trust_region_cg(matrix, unit, 1e3, tolerance=1e-9, max_iterations=3)
    assert (limited.status, limited.iterations, limited.at_boundary) == ("iteration_limit", 3, False)
    zero = trust_region_cg(matrix, torch.zeros_like(unit), 1.0)
    assert (zero.status, zero.products, zero.norm, zero.model_decrease) == ("interior", 0, 0.0, 0.0)
    assert zero.step.count_nonzero() == 0
    flat = trust_region_cg(torch.zeros(SIZE, SIZE, dtype=torch.float64), unit, 2.0)
    assert flat.status == "negative_curvature"
    torch.testing.assert_close(flat.step, -2 * unit)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
def test_float32_gradients_of_any_size(scale: float) -> None:
    matrix = with_spectrum(np.geomspace(0.5, 10, SIZE)).float()
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    for radius in (0.01, 1e4):
        result = trust_region_cg(matrix, g * scale, radius * scale, tolerance=1e-4)
        reference = trust_region_cg(matrix.double(), g.double(), radius, tolerance=1e-4)
        assert result.status == reference.status
        torch.testing.assert_close(result.step.double() / scale, reference.step, rtol=1e-3, atol=1e-4 * reference.norm)


def test_arguments_are_left_alone() -> None:
    g = torch.ones(3, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)
    for keep in (0, 5):
        result = trust_region_cg(identity, g, 10.0, keep=keep, preconditioner=lambda r: r)
        assert g.tolist() == [1.0, 1.0, 1.0]
        torch.testing.assert_close(result.step, -g)
        kept = result.step.clone()
        assert result.shortened(0.5) is not None or keep == 0
        assert torch.equal(result.step, kept)


def test_refusals() -> None:
    matrix = with_spectrum(np.geomspace(0.1, 10, SIZE))
    g = torch.ones(SIZE, dtype=torch.float64)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"gradient": g[:2]}, ValueError, r"trust_region_cg: gradient: expected shape \(40,\)"),
        ({"gradient": g * math.nan}, ValueError, "gradient: expected finite values"),
        ({"radius": 0.0}, ValueError, "radius: expected a finite number greater than 0, got 0.0"),
        ({"radius": math.inf}, ValueError, "radius: expected a finite number"),
        ({"radius": "1"}, TypeError, "radius: expected a number"),
        ({"tolerance": -1.0}, ValueError, "tolerance: expected a finite number greater than 0"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected at least 1"),
        ({"keep": -1}, ValueError, "keep: expected at least 0"),
        ({"keep": 1.5}, TypeError, "keep: expected an integer"),
        ({"preconditioner": lambda r: -r}, ValueError, "expected a positive definite one"),
        ({"preconditioner": 3}, TypeError, "preconditioner: expected an operator"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            trust_region_cg(matrix, **{"gradient": g, "radius": 1.0, **options})
    result = trust_region_cg(matrix, g, 1.0)
    with pytest.raises(ValueError, match="shortened: radius: expected a finite number greater than 0"):
        result.shortened(-1.0)
