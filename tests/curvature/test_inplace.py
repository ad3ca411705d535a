"""In-place operations around a layer never make the statistics wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.curvature.recording import same, watch


class Inplace(nn.Module):
    """Every kind of layer output, modified in place right away or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.tokens = nn.Linear(4, 5)  # with a bias its output is a view
        self.plain = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.act(self.conv(x)).flatten(2).mT
        h = self.act(self.tokens(h))
        h = self.act(self.plain(h)).mean(1)
        out = self.head(h)
        return out.mul_(2.0) if self.inplace else out * 2.0

    def act(self, x: Tensor) -> Tensor:
        """LeakyReLU, whose derivative tells outputs before it from those after it."""
        return functional.leaky_relu(x, 0.3, inplace=self.inplace)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_inplace_operations_after_a_layer(fisher: str) -> None:
    out_of_place, inplace = Inplace(False).double(), Inplace(True).double()
    inplace.load_state_dict(out_of_place.state_dict())
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    results = []
    for model in (out_of_place, inplace):
        recorder = watch(model, fisher=fisher)
        functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        results.append(recorder.collect().factors())
    assert set(results[0]) == {"conv", "tokens", "plain", "head"}
    assert same(*results)


class Overwrites(nn.Module):
    """Modifies a layer's input after the layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = x.clone()
        out = self.layer(x)
        x.zero_()
        return out


def test_input_overwritten_after_the_layer() -> None:
    model, x = Overwrites().double(), torch.randn(6, 5, dtype=torch.float64)
    recorder = watch(model)
    model(x)
    bordered = torch.cat([x, torch.ones(6, 1, dtype=x.dtype)], 1)
    torch.testing.assert_close(recorder.collect().factors()["layer"].A, bordered.T @ bordered / 6)
    recorder.remove()

    # With a mask the input is needed until the end of the forward.
    recorder = watch(model, mask=lambda args, kwargs, out: torch.ones(6, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"input of layer 'layer' was modified in place.*inplace=False"):
        model(x)
    assert recorder.collect().layers == {}
