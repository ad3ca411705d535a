"""Matrices with known spectra: clustered, repeated, negative and zero eigenvalues, of any scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronfac.linalg import cg, cg_shifts, minres
from kronfac.spectrum import density, diagonal, eigsh, trace
from tests.linalg.matrices import Counted, with_spectrum

Float64Array = npt.NDArray[np.float64]

KINDS = ("repeated", "clustered", "negative", "zeros", "plus and minus", "spread")
DECADES = st.integers(-20, 20)


def _spectrum(kind: str, size: int, generator: np.random.Generator) -> Float64Array:
    """Eigenvalues between -1 and 1, the distinct ones (or clusters) at least 0.05 apart unless they are spread."""
    centres = generator.permutation(np.linspace(-1, 1, 21))[: generator.integers(1, 6)]
    centres = centres / np.abs(centres).max() if np.abs(centres).max() else centres
    if kind == "spread":
        return generator.uniform(-1, 1, size)
    if kind == "negative":
        centres = -np.abs(centres) - 0.1
    if kind == "plus and minus":
        return np.concatenate([np.ones(size // 2), -np.ones(size - size // 2)])
    values = generator.choice(centres, size)
    if kind == "zeros":
        values[generator.permutation(size)[: size - max(1, size // 5)]] = 0.0
    if kind == "clustered":
        values = values + 1e-9 * generator.standard_normal(size)
    return values


def _wanted(values: Float64Array, k: int, which: str) -> Float64Array:
    keys = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}[which]
    return values[np.argsort(keys, kind="stable")][:k]


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(2, 90),
    k=st.integers(1, 12),
    which=st.sampled_from(["magnitude", "largest", "smallest"]),
    room=st.sampled_from([4, 20, 200]),
    decade=DECADES,
    seed=st.integers(0, 10_000),
)
def test_eigsh(kind: str, size: int, k: int, which: str, room: int, decade: int, seed: int) -> None:
    scale = 10.0**decade
    values = scale * _spectrum(kind, size, np.random.default_rng(seed))
    matrix = with_spectrum(values, seed)
    k, norm, width = min(k, size), float(np.abs(values).max()), float(values.max() - values.min())
    options: dict[str, Any] = {"basis_size": min(size, k + room), "max_products": 20_000, "multiplicity": True}
    result = eigsh(matrix, k, which, tol=1e-9, seed=seed, **options)
    exact = np.linalg.eigvalsh(matrix.numpy())
    assert result.converged.all()
    found, expected = result.values.numpy(), _wanted(exact, k, which)
    if which == "magnitude":
        found, expected = np.abs(found), np.abs(expected)
    # Of copies and neighbours within 1 % of the spectrum's width one may stand in for the other.
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-8 * norm + (0.01 * width if kind == "spread" else 0))
    errors = np.abs(result.values.numpy()[:, None] - exact).min(1)
    assert (errors <= result.residuals.numpy() + 1e-13 * norm).all()
    gram = result.vectors.mT @ result.vectors
    torch.testing.assert_close(gram, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0.0)


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(2, 60),
    decade=DECADES,
    seed=st.integers(0, 10_000),
)
def test_density(kind: str, size: int, decade: int, seed: int) -> None:
    values = 10.0**decade * _spectrum(kind, size, np.random.default_rng(seed))
    matrix = with_spectrum(values, seed)
    norm = float(np.abs(values).max())
    result = density(matrix, probes=40, seed=seed)
    nodes, weights = result.nodes.numpy(), result.weights.numpy()
    assert float(torch.trapezoid(result.values, result.grid)) == pytest.approx(1.0, abs=1e-6)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    # As many steps as eigenvalues: every node is one of them, and its weight their share, but for the probes' noise.
    assert (np.abs(nodes[weights > 1e-10][:, None] - values).min(1) <= 1e-7 * norm).all()
    for centre in values[:5]:
        near = np.abs(values - centre) <= 1e-6 * norm
        share = float(weights[np.abs(nodes - centre) <= 1e-6 * norm].sum())
        assert share == pytest.approx(near.mean(), abs=6 * np.sqrt(2 * near.mean() / size / 40) + 1e-9)
    assert abs(result.trace - values.sum()) <= 6 * result.trace_stderr + 1e-12 * size * norm
    square = float((values**2).sum())
    assert abs(result.squared_frobenius - square) <= 6 * result.squared_frobenius_stderr + 1e-12 * size * norm**2


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(2, 120),
    method=st.sampled_from(["hutchinson", "hutch++", "xtrace"]),
    decade=DECADES,
    seed=st.integers(0, 10_000),
)
def test_trace(kind: str, size: int, method: str, decade: int, seed: int) -> None:
    values = 10.0**decade * _spectrum(kind, size, np.random.default_rng(seed))
    norm = float(np.abs(values).max())
    result = trace(with_spectrum(values, seed), method, probes=60, seed=seed)
    assert abs(result.value - values.sum()) <= 6 * result.stderr + 1e-12 * size * norm
    rank = int((np.abs(values) > 1e-6 * norm).sum())
    if method != "hutchinson" and rank <= 18:  # within reach of the sketch: nothing is left to estimate
        assert result.stderr <= 1e-6 * norm
    assert result.stderr <= 2 * np.sqrt(2.0 * float((values**2).sum()) / 20) + 1e-12 * size * norm


METHODS: dict[str, Callable[[torch.Tensor], list[Any]]] = {
    "hutchinson": lambda a: [(r := trace(a, probes=8)).value, r.stderr],
    "hutch++": lambda a: [(r := trace(a, "hutch++", probes=12)).value, r.stderr],
    "xtrace": lambda a: [(r := trace(a, "xtrace", probes=12)).value, r.stderr],
    "diagonal": lambda a: [(r := diagonal(a, probes=8)).values, r.stderr],
    "xdiag": lambda a: [(r := diagonal(a, "xdiag", probes=12)).values, r.stderr],
    "density": lambda a: [(r := density(a, probes=3)).nodes, r.grid, r.trace, r.trace_stderr],
    "eigsh": lambda a: [(r := eigsh(a, 3, basis_size=9)).values, r.residuals],
    "smallest": lambda a: [(r := eigsh(a, 3, "smallest", basis_size=9)).values, r.residuals],
}


SKETCHES = ("hutch++", "xtrace", "xdiag")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_units_do_not_matter(name: str, kind: str, dtype: torch.dtype) -> None:
    """Of a matrix times a power of two, which costs no digit, every result is that power times the result."""
    matrix = with_spectrum(_spectrum(kind, 40, np.random.default_rng(0)), dtype=dtype)
    reference = METHODS[name](matrix)
    for power in (-66, -30, 30, 66):  # 1e-20 to 1e20
        for found, expected in zip(METHODS[name](matrix * 2.0**power), reference, strict=True):
            found, expected = torch.as_tensor(found), torch.as_tensor(expected)
            if name in SKETCHES:  # LAPACK's QR scales what is very small or large by other numbers
                atol = 1e3 * torch.finfo(dtype).eps * 40
                torch.testing.assert_close(found / 2.0**power, expected, rtol=0.0, atol=atol)
            else:
                assert torch.equal(found / 2.0**power, expected)


@given(
    size=st.integers(1, 60),
    distinct=st.integers(1, 60),
    condition=st.floats(0, 5),
    solver=st.sampled_from(["cg", "cg_shifts", "minres"]),
    decades=st.tuples(DECADES, DECADES),
    seed=st.integers(0, 10_000),
)
def test_positive_definite_systems(
    size: int, distinct: int, condition: float, solver: str, decades: tuple[int, int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    values = 10.0 ** generator.choice(np.linspace(-condition, 0, distinct), size) * 10.0 ** decades[0]
    matrix = with_spectrum(values, seed)
    b = torch.from_numpy(generator.standard_normal(size) * 10.0 ** decades[1])
    operator = Counted(matrix)
    if solver == "cg_shifts":
        result = cg_shifts(operator, b, [0.0, 10.0 ** decades[0]], tolerance=1e-8, max_iterations=2000)[0]
    else:
        result = (cg if solver == "cg" else minres)(operator, b, tolerance=1e-8, max_iterations=2000)
    assert result.converged
    # The residual that is stated is the one there is, and bounds the error by the least eigenvalue.
    residual = float((matrix @ result.x - b).norm() / b.norm())
    assert result.residual == pytest.approx(residual, rel=1e-6, abs=1e-13)
    assert residual <= 1e-8 * (1 + 1e-6)
    exact = torch.linalg.solve(matrix, b)
    assert float((result.x - exact).norm() / exact.norm()) <= 1e-8 * 10.0**condition * 1.01 + 1e-10


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(2, 60),
    consistent=st.booleans(),
    decades=st.tuples(DECADES, DECADES),
    seed=st.integers(0, 10_000),
)
def test_indefinite_and_singular_systems(
    kind: str, size: int, consistent: bool, decades: tuple[int, int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    values = 10.0 ** decades[0] * _spectrum(kind, size, generator)
    values[np.abs(values) < 1e-3 * np.abs(values).max()] = 0.0
    matrix = with_spectrum(values, seed)
    b = torch.from_numpy(generator.standard_normal(size) * 10.0 ** decades[1])
    if consistent or not (values == 0).any():
        b = matrix @ b / 10.0 ** decades[0]
        if float(b.norm()) == 0.0:
            return
        result = minres(matrix, b, tolerance=1e-7, max_iterations=2000)
        assert result.converged
        assert float((matrix @ result.x - b).norm() / b.norm()) <= 1e-7 * (1 + 1e-6)
        return
    # No solution: it says so, or solves in the sense of least squares where that is asked for.
    assert not minres(matrix, b, tolerance=1e-7, max_iterations=2000).converged
    matrix = matrix / 10.0 ** decades[0]  # Liu & Roosta's rule compares ‖Ar‖ with ‖Ax‖, which depends on A's unit
    result = minres(matrix, b, tolerance=1e-7, relative_to="solution", max_iterations=2000)
    assert result.converged
    least = torch.linalg.lstsq(matrix, b[:, None], rcond=1e-8, driver="gelsd").solution[:, 0]
    if float(least.norm()) > 0.0 and np.abs(values).max() > 0.0:
        assert float((matrix @ (result.x - least)).norm() / b.norm()) <= 1e-5
    # cg needs a positive definite matrix, and shows a direction in which this one is not.
    found = cg(matrix, b, max_iterations=2000)
    if found.status == "nonpositive_curvature":
        assert found.direction is not None
        rayleigh = float(found.direction @ matrix @ found.direction) / float(found.direction.square().sum())
        assert rayleigh <= 1e-12 * float(matrix.abs().max())
    else:
        assert not found.converged
