"""A weight (in, out), as of transformers' Conv1D, without that package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import TransposedLinearAdapter, register_adapter, registry
from kronfac.optim import KFAC


class Turned(nn.Module):
    """x @ weight + bias."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=torch.float64)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Pool(nn.Module):
    """The mean over the positions of (N, T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C)."""
        return x.mean(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_its_steps_are_those_of_a_linear_layer(
    fisher: str, sharing: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    register_adapter(f"{Turned.__module__}.{Turned.__qualname__}")(TransposedLinearAdapter)
    turned = nn.Sequential(Turned(4, 5, bias), nn.Tanh(), Turned(5, 3, bias), Pool())
    plain = nn.Sequential(nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, 3, bias), Pool()).double()
    for index in (0, 2):
        plain[index].load_state_dict({**turned[index].state_dict(), "weight": turned[index].weight.detach().T})
    options = {"fisher": fisher, "sharing": sharing, "weight_decay": 0.01, "inverse_every": 2}
    one, two = KFAC(turned, 0.1, **options), KFAC(plain, 0.1, **options)
    assert one.layers == two.layers == ("0", "2")
    for _ in range(4):
        x, y = torch.randn(6, 7, 4, dtype=torch.float64), torch.randint(3, (6,))
        for model, optimizer in ((turned, one), (plain, two)):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    for index in (0, 2):
        torch.testing.assert_close(turned[index].weight.mT, plain[index].weight)
        assert not bias or torch.allclose(turned[index].bias, plain[index].bias)
