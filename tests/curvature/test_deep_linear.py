"""On deep linear networks with a Gaussian likelihood K-FAC is the Fisher block itself, for the loss each mode assumes.

Eschenhagen et al., arXiv:2311.00636, propositions 1 and 2: "expand" for a loss of every position, "reduce" for a loss
of the mean over positions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kronfac.curvature import Gaussian, factors
from tests.curvature.models import relative

VARIANCE = 0.3


class Linears(nn.Module):
    """Tokens through linear layers, pooled or not."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 3) to (N, T, 2) or (N, 2)."""
        h = self.second(self.first(x))
        return self.last(h.mean(1) if self.pooled else h)


class Pixels(nn.Module):
    """Grouped and plain convolutions of one pixel, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 2)."""
        return self.last(self.second(self.first(x)).mean((-2, -1)))


class Embedded(nn.Module):
    """One word per example: the one-hot rows are those of a diagonal A."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N,) to (N, 2)."""
        return self.last(self.first(x))


CASES = {
    "expand": (lambda: Linears(False), (5, 3), "expand"),
    "reduce": (lambda: Linears(True), (5, 3), "reduce"),
    "reduce, convolutions": (Pixels, (3, 4, 4), "reduce"),
    "embedding": (Embedded, (), "expand"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_block_is_exact(name: str) -> None:
    make, shape, sharing = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(7, *shape, dtype=torch.float64) if shape else torch.randint(6, (7,))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    J = jacrev(lambda some: functional_call(model, some, (x,)))(parameters)
    out = model(x)
    terms = out.numel() // 2
    got = factors(model, x, likelihood=Gaussian(VARIANCE, terms // len(x)), fisher="exact", sharing=sharing)
    for layer, pair in got.items():
        module = model.get_submodule(layer)
        weight = J[f"{layer}.weight"].reshape(out.numel(), *module.weight.shape)  # type: ignore[union-attr]
        if isinstance(module, nn.Embedding):
            rows = weight.mT
        else:
            rows = weight.flatten(2)
            if module.bias is not None:
                rows = torch.cat([rows, J[f"{layer}.bias"].reshape(out.numel(), -1, 1)], 2)
        rows = rows.flatten(1)
        A = pair.A.diag() if pair.A.dim() == 1 else pair.A
        assert relative(torch.kron(pair.G, A), rows.T @ rows / (VARIANCE * terms)) < 1e-10
