"""NaN and infinity in data, weights and buffers are named, wherever they hide; nothing is computed from them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kronfac.operators import fisher, ggn, hessian
from kronfac.spectrum import block_traces, density, diagonal, eigsh, trace
from tests.operators.cases import make_case
from tests.operators.state import unchanged

BAD = [float("nan"), float("inf"), -float("inf")]


def _fisher(model: nn.Module, loss_fn: Any, data: Any, **options: Any) -> Any:
    return fisher(model, "categorical", data, **options)


MAKERS = [hessian, ggn, _fisher]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", BAD)
def test_weights(make: Any, bad: float) -> None:
    case = make_case("mlp")
    with torch.no_grad():
        case.model[2].weight[1, 2] = bad  # type: ignore[index,union-attr,operator]
    with unchanged(case.model), pytest.raises(ValueError, match=r"the model holds NaN or infinity in 2\.weight"):
        make(case.model, case.loss_fn, (case.inputs, case.targets))


@pytest.mark.parametrize("make", MAKERS)
def test_weights_that_go_bad_later(make: Any) -> None:
    case = make_case("mlp")
    operator = make(case.model, case.loss_fn, (case.inputs, case.targets))
    vector = torch.ones(operator.shape[0], dtype=torch.float64)
    operator @ vector
    case.model[0].bias.data[1] = float("nan")  # type: ignore[index,union-attr,operator]
    with unchanged(case.model), pytest.raises(ValueError, match=r"NaN or infinity in 0\.bias"):
        operator @ vector
    case.model[0].bias.data[1] = 0.0  # type: ignore[index,union-attr,operator]
    assert torch.isfinite(operator @ vector).all()


@pytest.mark.parametrize("make", MAKERS)
def test_buffers(make: Any) -> None:
    case = make_case("batchnorm")
    case.model[1].running_mean[0] = float("nan")  # type: ignore[index,union-attr,operator]
    with unchanged(case.model), pytest.raises(ValueError, match=r"NaN or infinity in 1\.running_mean"):
        make(case.model, case.loss_fn, (case.inputs, case.targets))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("form", ["batch", "list", "loader", "chunks"])
def test_inputs(make: Any, bad: float, form: str) -> None:
    case = make_case("mlp")
    case.inputs[8, 1] = bad
    data: Any = {
        "batch": (case.inputs, case.targets),
        "chunks": (case.inputs, case.targets),
        "list": [(case.inputs[:5], case.targets[:5]), (case.inputs[5:], case.targets[5:])],
        "loader": DataLoader(TensorDataset(case.inputs, case.targets), batch_size=5),
    }[form]
    options = {"chunk_size": 4} if form == "chunks" else {}
    number = 0 if form in ("batch", "chunks") else 1

    def run() -> None:  # where an activation swallows infinity, the loss is finite, and the product alone shows it
        operator = make(case.model, case.loss_fn, data, **options)
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)

    with unchanged(case.model), pytest.raises(ValueError, match=f"the inputs of batch {number} hold NaN or infinity"):
        run()


@pytest.mark.parametrize("make", [hessian, ggn])
def test_targets(make: Any) -> None:
    case = make_case("regression")
    case.targets[3, 1] = float("inf")
    with unchanged(case.model), pytest.raises(ValueError, match="the targets of batch 0 hold NaN or infinity"):
        make(case.model, case.loss_fn, (case.inputs, case.targets))


@pytest.mark.parametrize("make", [hessian, ggn])
def test_arrays_are_looked_through_too(make: Any) -> None:
    class Model(nn.Linear):
        def forward(self, x: Any) -> Tensor:
            return super().forward(torch.from_numpy(x))

    inputs = np.ones((4, 3), dtype=np.float32)
    inputs[2, 1] = np.nan
    with pytest.raises(ValueError, match="the inputs of batch 0 hold NaN"):
        make(Model(3, 2), functional.cross_entropy, (inputs, torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize("make", [hessian, ggn])
def test_overflow_is_told_from_bad_data(make: Any) -> None:
    case = make_case("mlp")

    def overflowing(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target) * 1e308 * 1e10

    with unchanged(case.model), pytest.raises(ValueError, match="model and data are finite, so that"):
        make(case.model, overflowing, (case.inputs, case.targets))


@pytest.mark.parametrize("make", [hessian, ggn])
@pytest.mark.parametrize(
    "method",
    [
        lambda op: eigsh(op, 2),
        lambda op: trace(op, probes=4),
        lambda op: trace(op, "xtrace", probes=4),
        lambda op: diagonal(op, probes=4),
        lambda op: block_traces(op, probes=2),
        lambda op: density(op, probes=2, steps=4),
    ],
    ids=["eigsh", "trace", "xtrace", "diagonal", "block_traces", "density"],
)
def test_no_method_returns_a_number_from_bad_weights(make: Any, method: Any) -> None:
    case = make_case("mlp")
    operator = make(case.model, case.loss_fn, (case.inputs, case.targets))
    with torch.no_grad():
        case.model[0].weight[0, 0] = float("nan")  # type: ignore[index,union-attr,operator]
    with unchanged(case.model), pytest.raises(ValueError, match=r"NaN or infinity in 0\.weight"):
        method(operator)


def test_a_loader_that_changes_in_the_middle_of_a_method() -> None:
    case = make_case("mlp")

    class Drifting:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            yield case.inputs + (1e-9 if self.passes == 8 else 0.0), case.targets

    for method in (
        lambda op: eigsh(op, 3),
        lambda op: trace(op, probes=80),
        lambda op: density(op, probes=2, steps=20),
    ):
        operator = hessian(case.model, case.loss_fn, Drifting())
        with unchanged(case.model), pytest.raises(ValueError, match="batch 0 differs from the first pass"):
            method(operator)


def test_more_eigenvalues_than_there_are() -> None:
    case = make_case("mlp")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets), ["2.bias"])
    with pytest.raises(ValueError, match=re.escape("k: expected at most n = 3 eigenpairs, got 4")):
        eigsh(operator, 4)
    assert len(eigsh(operator, 3).values) == 3


def test_a_budget_too_small_for_the_precision_is_seen_in_the_result() -> None:
    case = make_case("mlp")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    for method in ("hutchinson", "xtrace"):
        result = trace(operator, method, target_relative=1e-4, max_products=16)
        assert result.products <= 16
        assert result.stderr > 1e-4 * abs(result.value)
        assert not result.converged
        assert trace(operator, method, target_relative=0.3).converged
        assert trace(operator, method, probes=16).converged  # of what was asked for, nothing is missing
    blocks = block_traces(operator, target_relative=1e-4, max_products=16)
    largest = max(abs(found.trace) for found in blocks.values())
    assert [found.converged for found in blocks.values()] == [
        found.trace_stderr <= 1e-4 * largest for found in blocks.values()
    ]
    assert not all(found.converged for found in blocks.values())
    assert all(found.converged for found in block_traces(operator, target_relative=0.5).values())
    pairs = eigsh(operator, 5, max_products=10, tol=1e-10)
    assert not pairs.converged.all()
    assert (pairs.residuals[~pairs.converged] > 1e-10 * pairs.values.abs().max()).all()
