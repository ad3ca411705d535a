"""How often one standard error covers the true trace, for the Hessians of trained networks.

Expected are 68 % (Student's t with 29 degrees of freedom: 67.5 %). Over 200 seeds the share has a standard deviation of
3.3 points of its own, half of what is allowed: one of dozens of layers falls outside by chance. Over 1,000 it is 1.5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kronfac.operators import CurvatureOperator
from kronfac.spectrum import block_traces, trace
from tests.linalg.matrices import Counted
from tests.spectrum.trained import Trained

# Products that make 30 samples: two more thirds of Hutch++ go into the sketch and its trace, half of XTrace's.
PROBES = {"hutchinson": 30, "hutch++": 90, "xtrace": 60}
SEEDS = 1000

pytestmark = pytest.mark.slow


class _Diagonal:
    """A diagonal matrix as an operator."""

    dtype = torch.float64

    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        self.values = torch.from_numpy(values)
        self.shape = (len(values), len(values))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.values * vectors if vectors.ndim == 1 else self.values[:, None] * vectors


def _check(operator: Any, truth: float, method: str, distribution: str) -> None:
    results = [
        trace(operator, method, probes=PROBES[method], distribution=distribution, seed=seed) for seed in range(SEEDS)
    ]
    errors = np.array([result.value for result in results]) - truth
    stderrs = np.array([result.stderr for result in results])
    assert 0.61 <= float((np.abs(errors) <= stderrs).mean()) <= 0.75
    assert errors.std() == pytest.approx(np.sqrt(np.square(stderrs).mean()), rel=0.2)
    assert abs(errors.mean()) <= 4 * errors.std() / np.sqrt(SEEDS)
    assert {len(result.samples) for result in results} == {30}


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_with_a_sketch(network: Trained, method: str) -> None:
    # Gaussian probes, and those on the sphere, have no preferred directions: the diagonal matrix of the eigenvalues
    # has estimates of the same distribution, at a hundredth of the cost.
    spectrum = network.spectrum("hessian")
    _check(_Diagonal(spectrum), float(spectrum.sum()), method, "gaussian")


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("method", PROBES)
def test_on_the_matrix_itself(network: Trained, kind: str, method: str) -> None:
    dense = network.dense(kind)
    # As a bare operator, of which no call checks again that it is symmetric.
    _check(Counted(dense), float(dense.trace()), method, "rademacher")


def _with_dense_products(network: Trained, kind: str, monkeypatch: pytest.MonkeyPatch) -> CurvatureOperator:
    """Kronfac's operator with the products of the dense matrix, which are cheaper."""
    operator, dense = network.operator(kind), network.dense(kind)
    offsets = operator._layout.offsets

    def multiply(indices: tuple[int, ...], layout: Any, rows: Tensor) -> Tensor:
        if len(indices) == len(operator.names):
            return rows @ dense
        places = torch.cat([torch.arange(offsets[index], offsets[index + 1]) for index in indices])
        return rows @ dense[places][:, places]

    monkeypatch.setattr(operator._engine, "multiply", multiply)
    return operator


@pytest.mark.parametrize("restricted", [False, True])
def test_block_traces(network: Trained, restricted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, groups = network.dense("hessian"), network.groups()
    operator = _with_dense_products(network, "hessian", monkeypatch)
    errors: dict[str, list[float]] = {name: [] for name in groups}
    stderrs: dict[str, list[float]] = {name: [] for name in groups}
    for seed in range(SEEDS):
        found = block_traces(operator, probes=30, restricted=restricted, seed=seed)
        assert list(found) == list(groups)
        for name, result in found.items():
            errors[name].append(result.trace - float(dense.diagonal()[groups[name]].sum()))
            stderrs[name].append(result.trace_stderr)
    covered = {name: float((np.abs(errors[name]) <= np.array(stderrs[name])).mean()) for name in groups}
    assert all(0.61 <= share <= 0.75 for share in covered.values()), covered
    for name in groups:
        assert abs(np.mean(errors[name])) <= 4 * np.std(errors[name]) / np.sqrt(SEEDS)
