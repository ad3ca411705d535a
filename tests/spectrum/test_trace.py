from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kronfac.operators import hessian
from kronfac.spectrum import trace
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import make_case

MATRIX = with_spectrum(np.linspace(-1, 3, 60))
TRUTH = 60.0


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_standard_error_covers_the_truth_at_the_right_rate(distribution: str) -> None:
    results = [trace(MATRIX, probes=40, distribution=distribution, seed=seed) for seed in range(300)]
    errors = np.array([result.value - TRUTH for result in results])
    scores = errors / np.array([result.stderr for result in results])
    # 95 % within two standard errors (Student's t with 39 degrees of freedom: 94.8 %), 68 % within one; ±4σ.
    assert 0.89 <= float((np.abs(scores) <= 2).mean()) <= 0.995
    assert 0.57 <= float((np.abs(scores) <= 1).mean()) <= 0.79
    diagonal = MATRIX.diagonal()
    variance = 2 * float(MATRIX.square().sum() - (diagonal.square().sum() if distribution == "rademacher" else 0))
    assert errors.std() == pytest.approx(np.sqrt(variance / 40), rel=0.2)
    assert abs(errors.mean()) < 4 * np.sqrt(variance / 40 / 300)


def test_exact_for_a_diagonal_matrix() -> None:
    result = trace(torch.diag(torch.arange(1.0, 6.0)), probes=2)
    assert (result.value, result.stderr, result.products) == (15.0, 0.0, 2)


def test_target_standard_error() -> None:
    operator = Counted(MATRIX)
    calls: list[tuple[int, int | None]] = []
    result = trace(operator, target_stderr=1.0, progress=lambda done, total: calls.append((done, total)))
    assert result.stderr <= 1.0
    assert result.products == operator.products == calls[-1][0] == len(result.samples)
    assert calls[-1][1] is None
    looser = trace(MATRIX, target_stderr=4.0)
    assert 16 <= looser.products < result.products
    assert torch.equal(looser.samples, result.samples[: looser.products])
    capped = trace(MATRIX, target_stderr=1e-6, max_products=21)
    assert capped.products == 21
    assert capped.stderr > 1e-6


def test_network() -> None:
    case = make_case("convnet", torch.float32)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    calls: list[tuple[int, int | None]] = []
    result = trace(operator, probes=100, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (100, 100)
    truth = float(operator.to_dense().trace())
    assert abs(result.value - truth) < 4 * result.stderr
    assert result.samples.dtype == torch.float64
    assert result.value == pytest.approx(float(result.samples.mean()))


def test_same_seed_same_result() -> None:
    state = torch.get_rng_state()
    assert torch.equal(trace(MATRIX, seed=1).samples, trace(MATRIX, seed=1).samples)
    assert not torch.equal(trace(MATRIX, seed=1).samples, trace(MATRIX, seed=2).samples)
    assert torch.equal(torch.get_rng_state(), state)


DECAYING = 1 / np.arange(1, 201) ** 2
SPECTRA = {
    "decaying": DECAYING,
    "geometric": 0.8 ** np.arange(200),
    "indefinite": np.concatenate([10 * 0.7 ** np.arange(100), -5 * 0.75 ** np.arange(100)]),
    "flat": np.linspace(1, 3, 200),
}


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("name", SPECTRA)
def test_every_method_is_unbiased_and_its_standard_error_honest(method: str, name: str) -> None:
    matrix = with_spectrum(SPECTRA[name])
    truth = float(matrix.trace())
    # as many samples for each: 90 products make 30 with Hutch++, 60 make 30 with XTrace
    probes = {"hutchinson": 40, "hutch++": 90, "xtrace": 60}[method]
    results = [trace(matrix, method, probes=probes, seed=seed) for seed in range(200)]
    errors = np.array([result.value for result in results]) - truth
    covered = np.abs(errors) <= np.array([result.stderr for result in results])
    assert 0.58 <= covered.mean() <= 0.78  # 68 %: two of its own standard deviations, 3.3 points, and Student's t
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(200)
    assert {result.products for result in results} == {probes}
    assert results[0].value == pytest.approx(float(results[0].samples.mean()))


@pytest.mark.parametrize("probes", [16, pytest.param(60, marks=pytest.mark.slow)])
def test_the_standard_error_of_xtrace_is_unbiased(probes: int) -> None:
    """The mean of its square is the variance, though the estimates share all probes but one."""
    for name in SPECTRA:
        values = torch.tensor(SPECTRA[name])

        class Diagonal:
            shape = (len(values), len(values))
            dtype = torch.float64

            def __matmul__(self, vectors: torch.Tensor, values: torch.Tensor = values) -> torch.Tensor:
                return values[:, None] * vectors

        results = [trace(Diagonal(), "xtrace", probes=probes, seed=seed) for seed in range(300)]
        errors = np.array([result.value for result in results]) - float(values.sum())
        stated = np.sqrt(np.mean([result.stderr**2 for result in results]))
        assert errors.std() == pytest.approx(stated, rel=0.15), name


def test_a_sketch_saves_products_where_eigenvalues_decay() -> None:
    matrix = with_spectrum(DECAYING)

    def error(method: str, probes: int) -> float:
        values = np.array([trace(matrix, method, probes=probes, seed=seed).value for seed in range(50)])
        return float(np.sqrt(np.square(values - matrix.trace().item()).mean()))

    assert error("xtrace", 60) < error("hutch++", 60) < error("hutchinson", 180)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_exact(method: str, dtype: torch.dtype) -> None:
    for rank in (0, 1, 5):
        matrix = with_spectrum(np.r_[np.arange(1, rank + 1), np.zeros(80 - rank)], dtype=dtype)
        result = trace(matrix, method, probes=40)
        size = max(1.0, rank * (rank + 1) / 2)
        assert abs(result.value - rank * (rank + 1) / 2) < 100 * torch.finfo(dtype).eps * size
        assert result.stderr < 100 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_exact_where_that_costs_no_more(method: str) -> None:
    operator = Counted(MATRIX)
    result = trace(operator, method, probes=200)
    assert (result.stderr, result.products, operator.products) == (0.0, 60, 60)
    assert result.value == pytest.approx(TRUTH, rel=1e-12)


def test_relative_target() -> None:
    for method in ("hutchinson", "xtrace"):
        operator = Counted(with_spectrum(DECAYING))
        result = trace(operator, method, target_relative=0.02)
        assert result.stderr <= 0.02 * result.value
        assert result.products == operator.products
        assert abs(result.value - float(operator.matrix.trace())) < 4 * result.stderr
    capped = trace(with_spectrum(SPECTRA["flat"]), "xtrace", target_relative=1e-6, max_products=41)
    assert capped.products == 40
    whole = trace(with_spectrum(SPECTRA["flat"]), "xtrace", target_relative=1e-6)
    assert whole.stderr == 0.0
    assert whole.value == pytest.approx(400.0, rel=1e-12)


def test_refusals() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"method": "xdiag"}, ValueError, r"method: expected one of 'hutchinson', 'hutch\+\+', 'xtrace', got 'xdiag'"),
        (
            {"method": "hutch++", "target_relative": 0.1},
            ValueError,
            "target_stderr, target_relative: expected None with method='hutch",
        ),
        ({"method": "hutch++", "probes": 5}, ValueError, "probes: expected at least 6, got 5"),
        ({"method": "xtrace", "probes": 3}, ValueError, "probes: expected at least 4, got 3"),
        ({"target_relative": -1.0}, ValueError, "target_relative: expected a finite number greater than 0"),
        ({"distribution": "uniform"}, ValueError, "distribution: expected one of"),
        ({"probes": 1}, ValueError, "probes: expected at least 2, got 1"),
        ({"probes": 10, "target_stderr": 1.0}, ValueError, "probes, target_stderr, target_relative: give one of them"),
        ({"target_stderr": 0.0}, ValueError, "target_stderr: expected a finite number greater than 0"),
        ({"target_stderr": 1.0, "max_products": 3}, ValueError, "max_products: expected at least 16"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.trace: " + match):
            trace(MATRIX, **options)
