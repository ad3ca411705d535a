"""Statistics taken on request: `Recorder.record`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronfac.curvature import KroneckerFactors
from tests.curvature.models import mlp
from tests.curvature.recording import same, watch


def test_record_forces_eval_mode_and_off_steps(
    model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]
) -> None:
    recorder = watch(model)
    recorder.due = False
    model.eval()
    with recorder.record():
        loss = model(x).sum()
    loss.backward()  # the graph is kept
    assert same(recorder.collect().factors(), expected)
    model(x)
    assert recorder.collect().layers == {}


@pytest.mark.parametrize("before", [True, False])
def test_update_only(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors], before: bool) -> None:
    recorder = watch(model)
    for turn in (before, not before):
        if turn:
            model(torch.randn(9, 5, dtype=torch.float64)).sum().backward()
        else:
            with recorder.record(update_only=True):
                model(x[:2])
                model(x[2:])
    assert same(recorder.collect().factors(), expected)
    # From the next step on, training forwards count again.
    model(x[:3])
    assert recorder.collect().terms == 3


def test_update_only_releases_the_graph(model: nn.Module, x: Tensor) -> None:
    recorder = watch(model, fisher="mc", fisher_samples=3)
    with recorder.record(update_only=True):
        out = model(x)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_update_only_needs_no_backward() -> None:
    model = mlp()
    recorder = watch(model, fisher="empirical")
    with pytest.raises(ValueError, match="update_only: expected False"):
        recorder.record(update_only=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_record_says_when_it_could_not(model: nn.Module, x: Tensor, mode: Callable[[], Any]) -> None:
    recorder = watch(model)
    with pytest.raises(RuntimeError, match=f"no statistics were taken.*{mode.__name__}"), recorder.record(), mode():
        model(x)
    with pytest.raises(RuntimeError, match=r"no statistics were taken.*not called as a module"), recorder.record():
        model.forward(x)


def test_record_lets_the_users_exception_through(model: nn.Module) -> None:
    recorder = watch(model)
    with pytest.raises(KeyError, match="mine"), recorder.record():
        raise KeyError("mine")
    model.eval()
    model(torch.randn(2, 5, dtype=torch.float64))
    assert recorder.collect().layers == {}
