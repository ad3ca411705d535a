"""A layer applied once for the whole batch, as position embeddings are: it sees the sum of the examples' gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC


class Positions(nn.Module):
    """Adds an embedding of the positions, looked up once or once per example: the same function."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.places, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.once = once

    def forward(self, x: Tensor) -> Tensor:
        """(N, 5, 4) to (N, 3)."""
        ids = torch.arange(5)[None]
        return self.head(torch.tanh(x + self.places(ids if self.once else ids.expand(len(x), 5))).sum(1))  # type: ignore[no-any-return]


def block(once: bool, fisher: str, samples: int = 1) -> Tensor:
    model = Positions(once).double()
    optimizer = KFAC(model, 0.0, fisher=fisher, fisher_samples=samples)
    torch.manual_seed(2)
    x, y = torch.randn(8, 5, 4, dtype=torch.float64), torch.randint(3, (8,))
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    A, G = optimizer.factors()["places"]
    return torch.kron(G, torch.diag(A))


def test_sampled_targets_make_the_block_right_in_the_mean() -> None:
    """Gradients of independently drawn targets are uncorrelated: cross products vanish in the mean."""
    expected = block(False, "exact")
    found = block(True, "mc", 4000)
    assert float((found - expected).norm()) < 0.1 * float(expected.norm())


def test_the_other_fishers_also_count_pairs_of_examples() -> None:
    """What the documentation says of them, so that it is noticed when it changes."""
    assert float(block(True, "exact").norm()) > 2 * float(block(False, "exact").norm())
