"""Problems as a user would write them; the tests name their functions on the command line."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kronfac import Gaussian
from kronfac.cli import UserProblem

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


def listed() -> tuple[nn.Module, Any, tuple[list[tuple[torch.Tensor, ...]], Loader]]:
    """Batches in a list, so that schedules and Newton-type optimizers may pick examples; with dropout."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    return model, F.cross_entropy, (list(DataLoader(_data(90, 1), 40)), DataLoader(_data(40, 2), 40))


def infinite() -> Any:
    """A loss that is not finite."""
    model, _, data = regression()
    return model, lambda out, y: (out - y).square().mean() / 0.0, data


def ragged() -> Any:
    """Batches of sequences of different lengths."""
    model, loss, _ = regression()
    return model, loss, [(torch.ones(2, length, 5), torch.ones(2, length, 1)) for length in (3, 4)]


def regression() -> tuple[nn.Module, Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Linear least squares, whose Hessian is known; batches of different sizes."""
    x, y = regression_data()
    return nn.Linear(5, 1), F.mse_loss, [(x[:7], y[:7]), (x[7:19], y[7:19]), (x[19:], y[19:])]


def regression_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (24, 5) and targets (24, 1)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(24, 5, generator=generator), torch.randn(24, 1, generator=generator)


class TwoParts(nn.Module):
    """Linear in two parts, each a layer: the blocks of the Hessian are those of its columns of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.left(x[:, :3]) + self.right(x[:, 3:])
        return out


def two_parts() -> UserProblem:
    """Half the squared error, so that the Hessian is the Fisher matrix of a Gaussian of variance 1; one batch."""
    return UserProblem(
        TwoParts(), lambda out, y: (out - y).square().mean() / 2, regression_data(), likelihood=Gaussian(variance=1.0)
    )


def grouped() -> UserProblem:
    """Groups of the user's own, which need not cover the model."""
    groups = {"weights": ["left.weight", "right"], "<bias> & more": ["left.bias"]}
    return UserProblem(TwoParts(), F.mse_loss, [regression_data()], [regression_data()], groups=groups)


def single_batch() -> Any:
    """A batch where a loader is expected."""
    model, loss, _ = regression()
    return model, loss, regression_data()


class _Interrupting:
    """Presses Ctrl-C while the loss is evaluated or differentiated for the n-th time, and once more if told to."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at, self.calls = at, 0

    def __call__(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(out, y)


def interrupted() -> Any:
    """Two batches, so that no graph is kept and the loss evaluated in every product; at the numbers in CALLS."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, _Interrupting(CALLS), list(DataLoader(_data(90, 1), 45))


CALLS: tuple[int, ...] = ()


def not_scalar() -> Any:
    """A loss without reduction."""
    model, _, batches = regression()
    return model, lambda out, y: (out - y) ** 2, batches


def breaking() -> Any:
    """A model that fails in a way of its own."""

    class Breaking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no such\nkey")

    return Breaking(5, 1), F.mse_loss, regression()[2]


def triples() -> Any:
    """Batches that are no pairs."""
    x, y = regression_data()
    return *regression()[:2], [(x, y, y)]


def unreadable() -> Any:
    """A loader that fails."""

    class Unreadable:
        def __iter__(self) -> Any:
            raise OSError("disk on fire")

    return *regression()[:2], Unreadable()


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
