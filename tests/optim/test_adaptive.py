"""The fully adaptive mode against algorithm 2 of Martens & Grosse, and what it must not touch, lose or accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.martens_grosse import Dense
from tests.optim.models import mlp, vectors


def closure_of(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    return closure


def matrices(model: nn.Module) -> list[Tensor]:
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    "options", [{"damping": 3.0}, {"damping": 1e-2, "weight_decay": 0.01, "inverse_every": 5}], ids=str
)
def test_a_trajectory_is_martens_and_grosses(options: dict[str, Any]) -> None:
    model = mlp(3, 5, 4, 3, dtype=torch.float64)
    optimizer = KFAC(model, adaptive=True, fisher="exact", **options)
    dense = Dense(
        [m.clone() for m in matrices(model)],
        options["damping"],
        options.get("weight_decay", 0.0),
        options.get("inverse_every", 10),
    )
    dampings, gammas = [], []
    for _ in range(45):
        x, y = vectors(20, 3, 3, dtype=torch.float64)
        optimizer.step(closure_of(model, optimizer, x, y))
        dense.step(x, y)
        state = optimizer.adaptation
        assert state is not None
        dampings.append(state.damping)
        gammas.append(state.gamma)
        assert (state.damping, state.gamma) == pytest.approx((dense.damping, dense.gamma), rel=1e-12)
        assert (state.alpha, state.mu) == pytest.approx((dense.alpha, dense.mu), rel=1e-6)
        assert state.rho == (None if dense.rho is None else pytest.approx(dense.rho, rel=1e-6))
        for ours, theirs in zip(matrices(model), dense.weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert len(set(dampings)) > 2
    assert len(set(gammas)) > 1
