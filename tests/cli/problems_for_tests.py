"""Problems as a user would write them; the tests name their functions on the command line."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Loader = DataLoader[tuple[torch.Tensor, ...]]


def _data(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, (x @ torch.arange(18.0).view(6, 3).sin()).argmax(dim=1))


class Noisy(nn.Module):
    """Adds noise from all three global random streams, which a continuation has to restore."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())


def classifier() -> tuple[nn.Module, Any, tuple[Loader, Loader]]:
    """Shuffled by the global stream."""
    model = nn.Sequential(Noisy(), nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    return model, F.cross_entropy, (DataLoader(_data(90, 1), 16, shuffle=True), DataLoader(_data(40, 2), 40))


def own_generator() -> tuple[nn.Module, Any, Loader]:
    """Shuffled by a generator of the loader's own; no test data."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(99)
    return model, F.cross_entropy, DataLoader(_data(90, 1), 16, shuffle=True, generator=generator)


def regression() -> tuple[nn.Module, Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Linear least squares, whose Hessian is known; batches of different sizes."""
    x, y = regression_data()
    return nn.Linear(5, 1), F.mse_loss, [(x[:7], y[:7]), (x[7:19], y[7:19]), (x[19:], y[19:])]


def regression_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (24, 5) and targets (24, 1)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(24, 5, generator=generator), torch.randn(24, 1, generator=generator)


def iterator() -> Any:
    """Data that end after one epoch."""
    model, loss, batches = regression()
    return model, loss, iter(batches)


def frozen() -> Any:
    """A model with nothing to train."""
    model, loss, batches = regression()
    return model.requires_grad_(False), loss, batches


def two_values() -> Any:
    """Not enough."""
    return regression()[:2]


def no_module() -> Any:
    """A model that is none."""
    return "model", *regression()[1:]


def no_data() -> Any:
    """Empty data."""
    return *regression()[:2], []
