"""Batch normalisation by the statistics of the batch, where that is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from kronfac.operators import fisher, ggn, hessian
from tests.operators.cases import Case, dense_ggn, dense_hessian, difference_hessian, make_case, relative_error
from tests.operators.state import unchanged


def _case() -> tuple[Case, nn.Module]:
    """A model with running statistics, and its twin that has none: it normalises by those of the batch even in eval."""
    case = make_case("batchnorm")
    twin = copy.deepcopy(case.model)
    norm = nn.BatchNorm2d(3, track_running_stats=False).double()
    norm.load_state_dict({name: value for name, value in twin[1].state_dict().items() if "." not in name}, strict=False)  # type: ignore[index,union-attr,operator]
    twin[1] = norm  # type: ignore[operator]
    return case, twin


@pytest.mark.parametrize("make", [hessian, ggn])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_the_batch(make: Any, training: bool) -> None:
    case, twin = _case()
    case.model.train(training)
    # Not torch.func's, which torch 2.13 gets wrong here: 6 % off, and not symmetric.
    oracle = difference_hessian if make is hessian else dense_ggn
    expected = oracle(twin, case.loss_fn, case.inputs, case.targets)
    with unchanged(case.model):
        operator = make(case.model, case.loss_fn, (case.inputs, case.targets), batch_norm="batch")
        dense = operator.to_dense()
    assert relative_error(dense, expected) < (1e-7 if make is hessian else 1e-10)
    running = make(case.model, case.loss_fn, (case.inputs, case.targets), batch_norm="running").to_dense()
    assert torch.equal(running, make(case.model, case.loss_fn, (case.inputs, case.targets)).to_dense())
    assert relative_error(running, expected) > 1e-2


def test_fisher_by_statistics_of_the_batch() -> None:
    case, twin = _case()
    batch = (case.inputs, case.targets)
    exact = fisher(case.model, "categorical", batch, kind="exact", batch_norm="batch").to_dense()
    assert relative_error(exact, dense_ggn(twin, case.loss_fn, case.inputs, case.targets)) < 1e-10


def test_only_batch_normalisation_is_put_in_train_mode() -> None:
    case, _ = _case()
    assert isinstance(case.model[3], nn.Dropout)  # type: ignore[index]
    batch = (case.inputs, case.targets)
    first, second = (hessian(case.model, case.loss_fn, batch, batch_norm="batch").to_dense() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("make", [hessian, ggn])
def test_more_than_one_batch_is_refused(make: Any) -> None:
    case, _ = _case()
    batch = (case.inputs, case.targets)
    halves = [(case.inputs[:3], case.targets[:3]), (case.inputs[3:], case.targets[3:])]
    cases: list[tuple[Any, dict[str, Any]]] = [
        (halves, {}),
        (batch, {"chunk_size": 3}),
        (batch, {"memory_limit": 20_000}),
    ]
    for data, options in cases:
        with unchanged(case.model), pytest.raises(ValueError, match='batch_norm: "batch" normalises 1 with the'):
            make(case.model, case.loss_fn, data, batch_norm="batch", **options)
    make(case.model, case.loss_fn, batch, batch_norm="batch", chunk_size=7)  # not cut
    with pytest.raises(ValueError, match="batch_norm: expected one of 'running', 'batch', got 'eval'"):
        make(case.model, case.loss_fn, batch, batch_norm="eval")
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(case.model))
    with pytest.raises(ValueError, match="a SyncBatchNorm"):
        make(synchronised, case.loss_fn, batch, batch_norm="batch")


def test_a_model_without_such_layers_takes_any_policy() -> None:
    case = make_case("mlp")
    halves = [(case.inputs[:3], case.targets[:3]), (case.inputs[3:], case.targets[3:])]
    dense = hessian(case.model, functional.cross_entropy, halves, batch_norm="batch").to_dense()
    assert relative_error(dense, dense_hessian(case.model, case.loss_fn, case.inputs, case.targets)) < 1e-12
