"""Functions with known minima, and a small network as a closure that remembers what it was asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def point(*entries: float) -> nn.Parameter:
    """A parameter in float64."""
    return nn.Parameter(torch.tensor(entries, dtype=torch.float64))


def rosenbrock(w: Tensor) -> Tensor:
    """Minimum 0 at (1, 1)."""
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2


def beale(w: Tensor) -> Tensor:
    """Minimum 0 at (3, ½)."""
    x, y = w
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def saddle(w: Tensor) -> Tensor:
    """Stationary at 0 with one direction up and two down; the minima, of value -½, lie at (0, ±1, ±1)."""
    return w[0].square() + (0.25 * w[1:].pow(4) - 0.5 * w[1:].square()).sum()


class Classified:
    """Cross entropy of a small network on separable data in float64, with its outputs.

    Attributes:
        model: of 3 inputs and 3 classes.
        asked: the indices of every call.
    """

    def __init__(self, examples: int, *, extra: nn.Module | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(examples, 3, dtype=torch.float64, generator=generator)
        self.y = self.x.argmax(1)
        torch.manual_seed(11)
        layers = [nn.Linear(3, 6), nn.Tanh(), *([] if extra is None else [extra]), nn.Linear(6, 3)]
        self.model = nn.Sequential(*layers).double()
        self.asked: list[Tensor | None] = []

    def __call__(self, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        self.asked.append(indices)
        chosen = slice(None) if indices is None else indices
        out = self.model(self.x[chosen])
        return functional.cross_entropy(out, self.y[chosen]), out
