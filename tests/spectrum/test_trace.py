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


def test_refusals() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"method": "xtrace"}, ValueError, "method: expected one of 'hutchinson', got 'xtrace'"),
        ({"distribution": "uniform"}, ValueError, "distribution: expected one of"),
        ({"probes": 1}, ValueError, "probes: expected at least 2, got 1"),
        ({"probes": 10, "target_stderr": 1.0}, ValueError, "probes, target_stderr: give one of them"),
        ({"target_stderr": 0.0}, ValueError, "target_stderr: expected a finite number greater than 0"),
        ({"target_stderr": 1.0, "max_products": 3}, ValueError, "max_products: expected at least 16"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.trace: " + match):
            trace(MATRIX, **options)
