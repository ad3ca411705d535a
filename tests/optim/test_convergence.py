"""On real data and per step, K-FAC is ahead of SGD with momentum at its best of several rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from kronfac.optim import KFAC

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    bunch = sklearn_datasets.load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )


def final_loss(make: Callable[[nn.Module], Optimizer], data: tuple[Tensor, Tensor]) -> float:
    """Training loss after five epochs, the median over three initialisations and orders."""
    x, y = data
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = convnet()
        optimizer = make(model)
        for _ in range(5):
            for chunk in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                functional.cross_entropy(model(x[chunk]), y[chunk]).backward()
                optimizer.step()
        with torch.no_grad():
            results.append(functional.cross_entropy(model.eval()(x), y).item())
    return statistics.median(results)


@pytest.fixture(scope="module")
def best_sgd(digits: tuple[Tensor, Tensor]) -> float:
    rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    losses = [final_loss(partial(_sgd, lr=lr), digits) for lr in rates]
    assert 0 < losses.index(min(losses)) < len(rates) - 1, losses  # the best is not at the edge of the grid
    return min(losses)


def _sgd(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize(("solve", "fisher"), [("inverse", "mc"), ("eigen", "mc"), ("inverse", "empirical")])
def test_kfac_is_ahead_of_tuned_sgd_per_step(
    digits: tuple[Tensor, Tensor], best_sgd: float, solve: str, fisher: str
) -> None:
    kfac = final_loss(lambda m: KFAC(m, 0.1, solve=solve, fisher=fisher, damping=1e-2, seed=0), digits)
    assert kfac < 0.5 * best_sgd
