from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kronfac.operators import ggn, hessian
from kronfac.spectrum import DensityResult, density
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import make_case

SPECTRA: dict[str, npt.NDArray[np.float64]] = {
    "uniform": np.linspace(-1, 1, 300),
    "outliers": np.concatenate([[50.0, 20.0, 15.0], np.random.default_rng(0).exponential(0.5, 497)]),
    "two_clusters": np.concatenate([np.full(120, -2.0), np.full(180, 1.0)]),
    "semicircle": np.linalg.eigvalsh((lambda a: (a + a.T) / 40)(np.random.default_rng(1).standard_normal((300, 300)))),
}


def _distance(result: DensityResult, values: npt.NDArray[np.float64]) -> float:
    """Wasserstein-1 distance of the broadened density to the true spectrum: area between the distribution functions."""
    grid, phi = result.grid.numpy(), result.values.numpy()
    steps = np.diff(grid)
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (phi[1:] + phi[:-1]) * steps)])
    truth = np.searchsorted(np.sort(values), grid, side="right") / len(values)
    gap = np.abs(cumulative - truth)
    return float((0.5 * (gap[1:] + gap[:-1]) * steps).sum())


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_known_spectra(name: str, dtype: torch.dtype) -> None:
    values = SPECTRA[name]
    result = density(with_spectrum(values, dtype=dtype))
    width = float(values.max() - values.min())
    assert float(torch.trapezoid(result.values, result.grid)) == pytest.approx(1.0, abs=1e-6)
    assert float(result.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert _distance(result, values) <= 0.02 * width
    assert result.sigma == pytest.approx(0.005 * width, rel=0.02)
    assert (result.grid.diff() > 0).all()
    assert (result.nodes.diff() >= 0).all()
    assert float(result.nodes[0]) >= float(values.min()) - 1e-4 * width
    assert float(result.nodes[-1]) <= float(values.max()) + 1e-4 * width


def test_implied_trace_and_norm_cover_the_truth() -> None:
    values = SPECTRA["outliers"]
    matrix = with_spectrum(values)
    results = [density(matrix, probes=12, steps=15, seed=seed) for seed in range(60)]
    for name, truth in (("trace", values.sum()), ("squared_frobenius", (values**2).sum())):
        estimates = np.array([getattr(result, name) for result in results])
        stderrs = np.array([getattr(result, name + "_stderr") for result in results])
        scores = (estimates - truth) / stderrs
        # Student's t with 11 degrees of freedom: 93 % within two; the samples are skewed, hence the room below.
        assert 0.8 <= float((np.abs(scores) <= 2).mean()) <= 1.0
        assert estimates.std() == pytest.approx(float(np.sqrt((stderrs**2).mean())), rel=0.35)
        assert abs(estimates.mean() - truth) < 4 * estimates.std() / np.sqrt(60)
    one = results[0]
    assert float(one.weights @ one.nodes) * len(values) == pytest.approx(one.trace)
    assert float(one.weights @ one.nodes**2) * len(values) == pytest.approx(one.squared_frobenius)


def test_all_steps_give_the_exact_moments() -> None:
    # With m = n the quadrature of each probe is exact; the trace is then vᵀAv over unit probes, no worse.
    matrix = with_spectrum([1.0, 2.0, 4.0, 8.0])
    result = density(matrix, probes=3, steps=100)
    assert result.products == 12
    np.testing.assert_allclose(result.nodes.numpy(), np.repeat([1.0, 2.0, 4.0, 8.0], 3), atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 3.0])
@pytest.mark.parametrize("size", [1, 9])
def test_multiples_of_the_identity(scale: float, size: int) -> None:
    result = density(scale * torch.eye(size, dtype=torch.float64), probes=2)
    assert float(torch.trapezoid(result.values, result.grid)) == pytest.approx(1.0, abs=1e-8)
    assert result.products == 2
    assert result.trace == pytest.approx(scale * size)
    assert result.trace_stderr == pytest.approx(0.0, abs=1e-12)


def test_sigma_and_grid_of_ones_own() -> None:
    matrix = with_spectrum(SPECTRA["uniform"])
    grid = np.linspace(-2, 2, 400)
    result = density(matrix, sigma=0.1, grid=grid)
    np.testing.assert_array_equal(result.grid.numpy(), grid)
    assert result.sigma == 0.1
    expected = np.zeros_like(grid)
    for node, weight in zip(result.nodes.numpy(), result.weights.numpy(), strict=True):
        expected += weight * np.exp(-0.5 * ((grid - node) / 0.1) ** 2) / (0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(result.values.numpy(), expected, atol=1e-12)
    fine = density(matrix, sigma=1e-4)
    assert float(torch.trapezoid(fine.values, fine.grid)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("make", [hessian, ggn])
def test_network(make: Any) -> None:
    case = make_case("mlp", torch.float32)
    operator = make(case.model, case.loss_fn, (case.inputs, case.targets))
    values = torch.linalg.eigvalsh(operator.to_dense().double()).numpy()
    calls: list[tuple[int, int | None]] = []
    result = density(operator, probes=40, progress=lambda done, total: calls.append((done, total)))
    assert _distance(result, values) <= 0.02 * float(values.max() - values.min())
    assert calls[-1][0] == result.products
    assert {total for _, total in calls} == {40 * 57}


def test_grouping_of_probes_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Counted(with_spectrum(SPECTRA["uniform"]))
    together = density(operator, probes=5, steps=10)
    assert operator.products == together.products == 50
    # The module, which the function of the same name hides.
    monkeypatch.setattr(sys.modules["kronfac.spectrum.density"], "BASIS_BYTES", 2 * 300 * 10 * 8)
    calls: list[int] = []
    apart = density(operator, probes=5, steps=10, progress=lambda done, total: calls.append(done))
    assert operator.products == 100
    assert calls == sorted(calls)
    assert calls[-1] == 50
    torch.testing.assert_close(apart.values, together.values)


def test_same_seed_same_result() -> None:
    matrix = with_spectrum(SPECTRA["uniform"])
    state = torch.get_rng_state()
    assert torch.equal(density(matrix, seed=3).values, density(matrix, seed=3).values)
    assert not torch.equal(density(matrix, seed=3).values, density(matrix, seed=4).values)
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals() -> None:
    matrix = torch.eye(4)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"probes": 1}, ValueError, "probes: expected at least 2"),
        ({"steps": 0}, ValueError, "steps: expected at least 1"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a finite number greater than 0"),
        ({"grid": [0, 1]}, TypeError, "grid: expected a tensor or an array"),
        ({"grid": torch.tensor([1.0, 0.0])}, ValueError, "grid: expected at least two finite, strictly ascending"),
        ({"grid": torch.zeros(3, 3)}, ValueError, "grid: expected at least two"),
        ({"seed": "0"}, TypeError, "seed: expected an integer"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.density: " + match):
            density(matrix, **options)
    with pytest.raises(ValueError, match="sigma: 1e-12 is too fine"):
        density(with_spectrum(SPECTRA["uniform"]), sigma=1e-12)
    with pytest.raises(ValueError, match="density: op: not symmetric"):
        density(Counted(torch.randn(30, 30)))
