"""Adapters of one's own, written from the documentation of LayerAdapter alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import LayerAdapter, factors, register_adapter
from kronfac.curvature import registry as registry_module
from kronfac.optim import KFAC


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_ADAPTERS", dict(registry_module._ADAPTERS))


class BlockDiagonal(nn.Module):
    """x (N, groups·inputs) times one matrix per group: a layer in groups."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.randn(groups, outputs))

    def forward(self, x: Tensor) -> Tensor:
        products = torch.einsum("ngi,goi->ngo", x.unflatten(1, (len(self.weight), -1)), self.weight)
        return (products + self.bias).flatten(1)


class BlockDiagonalAdapter(LayerAdapter):
    """One pair of factors per group; without positions "reduce" is "expand"."""

    sharings = ("expand", "reduce")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.groups, self.out_features, self.in_features = self.weight.shape

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.unflatten(1, (self.groups, -1))
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2) if self.has_bias else x
        sums = torch.einsum("ngi,ngj->gij", x, x)
        return sums if out is None else out.add_(sums)

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        g = g.unflatten(1, (self.groups, -1))
        sums = torch.einsum("ngi,ngj->gij", g, g) * scale
        return sums if out is None else out.add_(sums)

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        return shape[0]


class Scale(nn.Module):
    """A gain per feature: its gradient needs the input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ScaleAdapter(LayerAdapter):
    """The second moment of the gain's gradient as one dense block; W is the column of gains."""

    block = "dense"
    keeps_input = True

    def layer_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        return g * x

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        out = x.new_zeros(1, 1) if out is None else out
        return out.add_(len(x))

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        return scale * g.T @ g if out is None else out.addmm_(g.T, g, alpha=scale)

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        return shape[0]


def test_a_layer_in_groups_equals_separate_layers() -> None:
    register_adapter(BlockDiagonal)(BlockDiagonalAdapter)
    torch.manual_seed(0)
    net = nn.Sequential(BlockDiagonal(2, 3, 2), nn.Linear(4, 3)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    got = factors(net, x, likelihood="categorical", fisher="exact", sharing="reduce")["0"]

    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.first(x[:, :3]), self.second(x[:, 3:])], 1))  # type: ignore[no-any-return]

    separate = Separate().double()
    weight, bias = (p.detach() for p in net[0].parameters())
    separate.first.load_state_dict({"weight": weight[0], "bias": bias[0]})
    separate.second.load_state_dict({"weight": weight[1], "bias": bias[1]})
    separate.last.load_state_dict(net[1].state_dict())
    expected = factors(separate, x, likelihood="categorical", fisher="exact")
    for group, name in enumerate(("first", "second")):
        torch.testing.assert_close(got.A[group], expected[name].A)
        torch.testing.assert_close(got.G[group], expected[name].G)

    twin = [(net, KFAC(net, 0.1, fisher="exact")), (separate, KFAC(separate, 0.1, fisher="exact"))]
    y = torch.randint(3, (7,))
    for _ in range(3):
        for model, optimizer in twin:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(net(x), separate(x))


def test_a_dense_block_that_needs_the_input() -> None:
    register_adapter(Scale)(ScaleAdapter)
    net = nn.Sequential(Scale(4), nn.Tanh()).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    got = factors(net, x, likelihood="gaussian", fisher="exact")["0"]
    slopes = x * (1 - net(x).square())
    torch.testing.assert_close(got.G, (slopes.square().sum(0) / 6).diag().detach())
    optimizer = KFAC(net, 1.0, likelihood="gaussian", fisher="exact", momentum=0.0, kl_clip=None, damping=1e-8)
    start = net[0].weight.detach().clone()
    loss = net(x).square().sum() / 12
    loss.backward()
    gradient = net[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), start - gradient / (got.G.diagonal() + 1e-8))
