"""Densities on a logarithmic axis, their checks, and what an interrupt leaves."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kronfac.operators import ggn
from kronfac.spectrum import LogDensityResult, density
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import make_case

Array = npt.NDArray[np.float64]

POSITIVE = np.logspace(-4, 1, 75)
NEGATIVE = -np.logspace(-2, 0, 25)
DECADES = np.concatenate([POSITIVE, NEGATIVE, np.zeros(50)])


def _distance(grid: Array, values: Array, truth: Array, share: float) -> float:
    """Wasserstein-1 distance in decades between a density of this mass and the eigenvalues, both scaled to mass 1."""
    steps = np.diff(grid)
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (values[1:] + values[:-1]) * steps)]) / share
    expected = np.searchsorted(np.sort(np.log10(np.abs(truth))), grid, side="right") / len(truth)
    gap = np.abs(cumulative - expected)
    return float((0.5 * (gap[1:] + gap[:-1]) * steps).sum())


def test_decades_of_a_known_spectrum() -> None:
    result = density(with_spectrum(DECADES), axis="log", probes=60, steps=150)
    # Of 60 · 150 entries of the probes; the weights are chi-squared shares.
    assert result.positive_mass == pytest.approx(0.5, abs=0.03)
    assert result.negative_mass == pytest.approx(1 / 6, abs=0.02)
    assert result.zero_mass == pytest.approx(1 / 3, abs=0.03)
    assert result.positive_mass + result.negative_mass + result.zero_mass == pytest.approx(1.0, abs=1e-12)
    assert result.uncertain_mass < 1e-6  # all steps: the nodes are eigenvalues
    assert result.sigma == 0.05
    assert result.threshold == pytest.approx(100 * 2.2e-16 * 10, rel=0.01)
    grid = result.grid.numpy()
    for values, truth, mass in (
        (result.positive, POSITIVE, result.positive_mass),
        (result.negative, NEGATIVE, result.negative_mass),
    ):
        assert float(torch.trapezoid(values, result.grid)) == pytest.approx(mass, abs=1e-6)
        assert _distance(grid, values.numpy(), truth, mass) < 0.02 * 5


def test_the_broadening_itself() -> None:
    grid = np.linspace(-6, 3, 700)
    result = density(with_spectrum(DECADES), axis="log", steps=40, sigma=0.3, grid=grid, threshold=1e-3, seed=2)
    np.testing.assert_array_equal(result.grid.numpy(), grid)
    assert (result.sigma, result.threshold) == (0.3, 1e-3)
    nodes, weights = result.linear.nodes.numpy(), result.linear.weights.numpy()
    for values, sign in ((result.positive, 1), (result.negative, -1)):
        expected = np.zeros_like(grid)
        for node, weight in zip(nodes, weights, strict=True):
            if sign * node >= 1e-3:
                offset = (grid - math.log10(abs(node))) / 0.3
                expected += weight * np.exp(-0.5 * offset**2) / (0.3 * math.sqrt(2 * math.pi))
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-12)
    assert result.zero_mass == pytest.approx(weights[np.abs(nodes) < 1e-3].sum())
    # The linear form of the same call.
    linear = density(with_spectrum(DECADES), steps=40, seed=2)
    assert torch.equal(result.linear.values, linear.values)
    assert result.products == linear.products


@pytest.mark.parametrize("steps", [10, 40])
def test_each_node_has_an_eigenvalue_within_its_residual(steps: int) -> None:
    result = density(with_spectrum(DECADES), steps=steps).residuals, density(with_spectrum(DECADES), steps=steps).nodes
    assert result[0] is not None
    for residual, node in zip(result[0].tolist(), result[1].tolist(), strict=True):
        assert float(np.abs(DECADES - node).min()) <= residual + 1e-13


def test_more_steps_make_more_of_it_certain() -> None:
    values = np.logspace(-5, 2, 200)
    few, many = (density(with_spectrum(values), axis="log", steps=steps).uncertain_mass for steps in (20, 100))
    assert many < 0.5 * few
    assert 0.0 < few < 1.0


@pytest.mark.parametrize("scale", [0.0, 1e-20, 3.0])
def test_multiples_of_the_identity(scale: float) -> None:
    result = density(scale * torch.eye(6, dtype=torch.float64), axis="log", probes=2)
    assert result.positive_mass == pytest.approx(float(scale > 0))
    assert result.zero_mass == pytest.approx(float(scale == 0))
    assert float(torch.trapezoid(result.positive, result.grid)) == pytest.approx(float(scale > 0), abs=1e-8)


def test_float32_counts_round_off_as_zero() -> None:
    case = make_case("mlp", torch.float32)
    single = density(ggn(case.model, case.loss_fn, (case.inputs, case.targets)), axis="log", probes=60)
    exact = case.to(torch.float64)
    matrix = ggn(exact.model, exact.loss_fn, (exact.inputs, exact.targets)).to_dense()
    values = torch.linalg.eigvalsh(matrix).numpy()
    # At most 2 · 11 eigenvalues differ from zero: 3 classes, of which softmax makes 2 free, and 11 examples.
    assert (values > 1e-10).sum() == 22
    assert single.negative_mass < 0.01
    assert single.threshold == pytest.approx(1.2e-5 * values[-1], rel=0.05)
    assert single.positive_mass == pytest.approx((values > single.threshold).mean(), abs=0.06)


class _Changing(Counted):
    """Another matrix, symmetric too, from some product on."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return super().__matmul__(vectors) * (1.0 if self.products <= 200 else 2.0)


def test_checks() -> None:
    values = np.concatenate([[50.0, 20.0, 15.0], np.random.default_rng(0).exponential(0.5, 97)])
    matrix = with_spectrum(values)
    scores = []
    for seed in range(40):
        calls: list[tuple[int, int | None]] = []
        result = density(
            matrix, probes=12, steps=8, checks=20, seed=seed, progress=lambda d, t, calls=calls: calls.append((d, t))
        )
        assert result.checks is not None
        assert calls[-1] == (12 * 8 + 20, 12 * 8 + 20)
        assert result.products == 116
        assert result.checks.products == 20
        scores += [result.checks.trace_score, result.checks.squared_frobenius_score]
        assert abs(result.checks.trace - values.sum()) < 6 * result.checks.trace_stderr
    # About Student's t with more than 12 degrees of freedom.
    assert np.std(scores) == pytest.approx(1.1, abs=0.35)
    assert sum(abs(score) <= 4 for score in scores) >= 78
    once = density(matrix, probes=12, steps=8, checks=20)
    assert once.checks is not None
    assert once.checks.agree
    # The probes of the density are the same with and without.
    assert torch.equal(once.values, density(matrix, probes=12, steps=8).values)
    doubled = density(_Changing(with_spectrum(np.linspace(1, 2, 100))), probes=20, steps=10, checks=20).checks
    assert doubled is not None
    assert not doubled.agree
    assert doubled.trace_score < -4
    identity = density(torch.eye(5), probes=2, checks=2).checks
    assert identity is not None
    assert identity.agree


@pytest.fixture
def signals() -> Iterator[None]:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("signals")
def test_interrupted_in_a_step() -> None:
    matrix = with_spectrum(DECADES)

    def interrupt(done: int, total: int | None) -> None:
        if done == 4 * 6:
            signal.raise_signal(signal.SIGINT)

    part = density(matrix, probes=4, steps=30, checks=4, progress=interrupt)
    assert part.interrupted
    assert part.products == 24
    assert part.checks is None
    whole = density(matrix, probes=4, steps=6)
    assert not whole.interrupted
    for name in ("nodes", "weights", "values", "residuals"):
        assert torch.equal(getattr(part, name), getattr(whole, name)), name
    assert part.trace_stderr == whole.trace_stderr
    logarithmic = density(matrix, axis="log", probes=4, steps=30, progress=interrupt)
    assert logarithmic.interrupted


@pytest.mark.usefixtures("signals")
def test_interrupted_between_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum(DECADES)
    monkeypatch.setattr(sys.modules["kronfac.spectrum.density"], "BASIS_BYTES", 150 * 10 * 8)  # one at a time

    def interrupt(done: int, total: int | None) -> None:
        if done == 10:
            signal.raise_signal(signal.SIGINT)

    part = density(matrix, probes=4, steps=10, progress=interrupt)
    assert part.interrupted
    assert part.products == 10
    assert math.isinf(part.trace_stderr)
    assert float(part.weights.sum()) == pytest.approx(1.0)


@pytest.mark.usefixtures("signals")
def test_interrupted_in_the_checks() -> None:
    matrix = with_spectrum(DECADES)

    def interrupt(done: int, total: int | None) -> None:
        if done == 40 + 8:
            signal.raise_signal(signal.SIGINT)

    part = density(matrix, probes=4, steps=10, checks=20, progress=interrupt)
    assert part.interrupted
    assert part.checks is not None
    assert part.checks.products == 8
    assert torch.equal(part.values, density(matrix, probes=4, steps=10).values)


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    spectra: list[tuple[Array, int]] = [(DECADES, 3), (POSITIVE, 1), (np.zeros(4), 1)]
    for values, entries in spectra:
        result: LogDensityResult = density(with_spectrum(values), axis="log", steps=150)
        axes = result.plot()
        axes.figure.canvas.draw()
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(texts) == entries
        assert np.isfinite(axes.get_ylim()).all()
    _, given = pyplot.subplots()
    assert result.plot(given) is given
    pyplot.close("all")


def test_refusals() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"axis": "decades"}, ValueError, "axis: expected one of 'linear', 'log'"),
        ({"threshold": 1.0}, ValueError, 'threshold: is for axis="log"'),
        ({"threshold": 0.0, "axis": "log"}, ValueError, "threshold: expected a finite number greater than 0"),
        ({"sigma": 1e-9, "axis": "log"}, ValueError, "sigma: 1e-09 decades is too fine"),
        ({"sigma": -1.0, "axis": "log"}, ValueError, "sigma: expected a finite number greater than 0"),
        ({"grid": torch.zeros(2), "axis": "log"}, ValueError, "grid: expected at least two finite, strictly"),
        ({"checks": 1}, ValueError, "checks: expected 0 or at least 2"),
        ({"checks": -1}, ValueError, "checks: expected at least 0"),
    ]
    matrix = with_spectrum(POSITIVE[::15])
    for options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.density: " + match):
            density(matrix, **options)
