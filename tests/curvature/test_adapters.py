"""Adapters and their registry: which layers are covered, patches, and the layer as a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from kronfac.curvature import (
    ConvAdapter,
    LayerAdapter,
    LinearAdapter,
    adapter_for,
    factors,
    find_layers,
    register_adapter,
)
from kronfac.curvature import registry as registry_module

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "no bias": {"kernel_size": 2, "bias": False},
    "strided": {"kernel_size": 3, "stride": (2, 3), "padding": 1},
    "dilated": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": (2, 1)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same, uneven": {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "stride": 2},
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolution_statistics(case: str, batched: bool) -> None:
    """Patches recovered from the convolution itself: with one output channel per patch entry it returns the patch."""
    layer = nn.Conv2d(2, 4, **CONVOLUTIONS[case]).double()
    adapter = adapter_for(layer)
    assert isinstance(adapter, ConvAdapter)
    x = torch.randn(*[3] * batched, 2, 9, 8, dtype=torch.float64)
    d = layer.weight[0].numel()
    options = {"bias": False, **{k: v for k, v in CONVOLUTIONS[case].items() if k != "bias"}}
    probe = nn.Conv2d(2, d, **options).double()
    with torch.no_grad():
        probe.weight.copy_(torch.eye(d, dtype=torch.float64).view(d, *layer.weight.shape[1:]))
        patches, out = probe(x), layer(x)
    rows = patches.movedim(-3, -1).reshape(-1, d)
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    sums = adapter.input_statistics(None, x, None)
    torch.testing.assert_close(sums, rows.T @ rows)
    assert adapter.input_statistics(sums, x, None) is sums
    torch.testing.assert_close(sums, 2 * rows.T @ rows)

    g = torch.randn_like(out)
    columns = g.movedim(-3, -1).reshape(-1, 4)
    sums = adapter.output_statistics(None, g, None, 0.5)
    torch.testing.assert_close(sums, 0.5 * columns.T @ columns)
    adapter.output_statistics(sums, g, None, 2.0)
    torch.testing.assert_close(sums, 2.5 * columns.T @ columns)
    assert adapter.positions(out.shape, None) == len(columns) == len(rows)
    # The layer is its matrix times the patches.
    torch.testing.assert_close(rows @ adapter.weight_matrix().T, out.movedim(-3, -1).reshape(-1, 4))


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), nn.Conv2d(2, 3, (3, 2))])
def test_the_layer_as_a_matrix(layer: nn.Module) -> None:
    adapter = adapter_for(layer)
    assert adapter is not None
    assert adapter.parameters() == tuple(layer.parameters())
    with pytest.raises(ValueError, match=r"has no \.grad"):
        adapter.gradient()
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    V = adapter.gradient()
    assert V.shape == (adapter.out_features, adapter.in_features + adapter.has_bias) == adapter.factor_sizes[::-1]
    for part, p in zip(adapter.split(V), layer.parameters(), strict=True):
        assert torch.equal(part, p.grad)
    for part, p in zip(adapter.split(adapter.weight_matrix()), layer.parameters(), strict=True):
        assert torch.equal(part, p)
    with pytest.raises(ValueError, match=r"split: matrix: expected shape \(3, "):
        adapter.split(V.T)


def test_frozen_parameters() -> None:
    layer = nn.Linear(5, 3)
    layer.bias.requires_grad_(False)
    adapter = adapter_for(layer)
    assert adapter is not None
    assert not adapter.has_bias
    assert adapter.parameters() == (layer.weight,)
    assert adapter.weight_matrix().shape == (3, 5)
    layer.weight.requires_grad_(False)
    assert adapter.parameters() == ()
    assert find_layers(layer) == {}


class OwnForward(nn.Linear):
    """A Linear that is none."""

    def forward(self, x: Tensor) -> Tensor:
        """Something else."""
        return functional.linear(x, self.weight.square(), self.bias)


class OwnConvolution(nn.Conv2d):
    """A standardised convolution."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class OwnInit(nn.Linear):
    """A Linear with another start."""

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)


def _patched() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _pruned() -> nn.Module:
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", amount=2)
    return layer


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(3, 4, max_norm=1.0),
        nn.EmbeddingBag(3, 4),
        nn.LSTM(3, 4),
        nn.GRUCell(3, 4),
        nn.SyncBatchNorm(3),
        nn.Bilinear(2, 2, 2),
        nn.MultiheadAttention(4, 2).out_proj,
        OwnForward(3, 3),
        OwnConvolution(2, 3, 3),
        _patched(),
        _pruned(),
        parametrizations.weight_norm(nn.Linear(3, 3)),
        parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)),
        nn.Linear(3, 3, dtype=torch.complex64),
        nn.utils.skip_init(nn.Linear, 0, 3),
        nn.ReLU(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_no_adapter_covers(module: nn.Module) -> None:
    assert adapter_for(module) is None


def test_subclasses_with_the_same_forward_are_covered() -> None:
    assert isinstance(adapter_for(OwnInit(3, 2)), LinearAdapter)


def test_lazy_layers() -> None:
    layer = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="no parameters yet; call the model once"):
        adapter_for(layer)
    layer(torch.randn(2, 5))
    assert isinstance(adapter_for(layer), LinearAdapter)


def test_shared_parameters_are_not_covered() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    assert set(find_layers(model)) == {"1"}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    assert find_layers(model) == {}


def test_an_adapter_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer type that kronfac does not know: the input scaled by a constant, keyword argument and all."""
    monkeypatch.setattr(registry_module, "_ADAPTERS", dict(registry_module._ADAPTERS))

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))

        def forward(self, *, features: Tensor) -> Tensor:
            return 2 * features @ self.weight.T

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Doubled()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(features=x)

    net = Net()
    assert find_layers(net) == {}

    @register_adapter(Doubled)
    class DoubledAdapter(LayerAdapter):
        def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
            return 4 * x.T @ x if out is None else out.addmm_(x.T, x, alpha=4)

        def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
            return scale * g.T @ g if out is None else out.addmm_(g.T, g, alpha=scale)

        def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
            return shape[0]

    x = torch.randn(6, 5, dtype=torch.float64)
    got = factors(net, x, likelihood="gaussian", fisher="exact")["layer"]
    torch.testing.assert_close(got.A, 4 * x.T @ x / 6)
    torch.testing.assert_close(got.G, torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="layer 'layer': DoubledAdapter follows 'expand', got 'reduce'"):
        factors(net, x, likelihood="gaussian", fisher="exact", sharing="reduce")


def test_register_adapter_refuses_what_is_none() -> None:
    with pytest.raises(TypeError, match="module_type: expected a subclass of torch"):
        register_adapter(int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a subclass of LayerAdapter"):
        register_adapter(nn.Identity)(int)  # type: ignore[type-var]


def test_layers_want_a_tensor() -> None:
    adapter = adapter_for(nn.Linear(2, 2))
    assert adapter is not None
    with pytest.raises(TypeError, match="input of Linear: expected a tensor, got a list"):
        adapter.layer_input(([1.0],), {})
