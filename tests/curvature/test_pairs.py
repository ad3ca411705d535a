"""Statistics of pairs of inputs and gradients against the gradients of single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical, Gaussian, LayerAdapter, LinearAdapter, Recorder, find_layers, pairs
from kronfac.curvature.pairs import RotatedSquares, SquaredGradients
from tests.curvature.models import Tokens, relative
from tests.curvature.oracle import OneLayer
from tests.curvature.per_example import mean_squares, output_gradients
from tests.curvature.test_layer_oracles import CASES, data, model_of

LAYERS = sorted(name for name in CASES if name != "Embedding")


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def bases(adapter: LayerAdapter) -> tuple[Tensor, Tensor]:
    front = () if adapter.groups == 1 else (adapter.groups,)
    inputs, outputs = adapter.factor_sizes
    return orthogonal(*front, outputs, outputs), orthogonal(*front, inputs, inputs)


def record(net: nn.Module, layer: str, x: Tensor, **options: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a recorder takes of one layer in random bases, and the bases."""
    layers = find_layers(net)
    adapter = layers[layer]
    left, right = bases(adapter)
    rotated = RotatedSquares(adapter)
    rotated.rotate(left, right)
    extra = {layer: {"rotated": rotated, "squares": SquaredGradients(adapter)}}
    recorder = Recorder(net, layers, extra=extra, **options)
    net(x)
    sums = recorder.collect().scaled_sums()[layer]
    recorder.remove()
    return {key: total * scale for key, (total, scale) in sums.extra.items()}, left, right


def check(
    net: nn.Module, layer: str, x: Tensor, *, fisher: str, likelihood: Any, draws: int = 1, **options: Any
) -> None:
    adapter = find_layers(net)[layer]
    generator = Generator().manual_seed(3)
    got, left, right = record(
        net, layer, x, fisher=fisher, likelihood=likelihood, fisher_samples=draws, generator=generator, **options
    )
    logits = net(x).detach()
    vectors = output_gradients(likelihood, logits, fisher, seed=3, draws=draws)
    terms = likelihood.terms(logits, None)
    assert relative(got["squares"], mean_squares(net, adapter, x, vectors, terms)) < 1e-10
    assert relative(got["rotated"], mean_squares(net, adapter, x, vectors, terms, left, right)) < 1e-10


@pytest.mark.parametrize(
    ("name", "fisher", "sharing"),
    [
        *((name, "mc", ("expand", "reduce")[index % 2]) for index, name in enumerate(LAYERS)),
        *((name, "exact", "expand") for name in ("Linear", "Linear on tokens", "Conv1d depthwise", "Conv2d")),
        *((name, "mc", "reduce") for name in ("Linear on tokens", "Conv2d")),
        *((name, "mc", "expand") for name in ("Linear on tokens", "Conv2d")),
    ],
)
def test_layer(name: str, fisher: str, sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With either sharing: the gradient of an example is what it is."""
    monkeypatch.setattr(pairs, "CHUNK", 60 if sharing == "reduce" else 1 << 22)  # one or two examples at a time
    net = model_of(CASES[name])
    check(net, "layer", data(CASES[name]), fisher=fisher, likelihood=Gaussian(0.7), draws=2, sharing=sharing)


@pytest.mark.parametrize("name", ["Linear on tokens", "Conv2d", "Conv2d groups"])
def test_training_targets(name: str) -> None:
    net, x = model_of(CASES[name]), data(CASES[name])
    adapter, y = find_layers(net)["layer"], torch.tensor([0, 2, 1, 1])
    left, right = bases(adapter)
    rotated = RotatedSquares(adapter)
    rotated.rotate(left, right)
    recorder = Recorder(net, {"layer": adapter}, fisher="empirical", extra={"layer": {"S": rotated}})
    (functional.cross_entropy(net(x), y) * 64).backward()
    net.zero_grad()
    total, scale = recorder.collect(loss_scale=64).scaled_sums()["layer"].extra["S"]
    recorder.remove()
    vector = Categorical().target_gradients(net(x).detach(), y, None)
    assert relative(total * scale, mean_squares(net, adapter, x, [(vector, 1.0)], len(x), left, right)) < 1e-10


@settings(max_examples=8, deadline=None)
@given(
    axes=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.integers(5, 7),
    outputs=st.sampled_from([2, 8, 20]),
    bias=st.booleans(),
    chunk=st.sampled_from([1, 500, 1 << 22]),
)
def test_convolutions(
    axes: int, groups: int, kernel: int, stride: int, padding: int, dilation: int, size: int, outputs: int, bias: bool,
    chunk: int,
) -> None:  # fmt: skip
    """Both ways: positions rotated one by one, and whole gradients rotated."""
    torch.manual_seed(axes * size)
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    layer = kind(2, outputs, kernel, stride, padding, dilation, groups, bias).double()
    x = torch.randn(3, 2, *[size] * axes, dtype=torch.float64)
    net = OneLayer(layer, layer(x).flatten(1).shape[1]).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "CHUNK", chunk)
        check(net, "layer", x, fisher="mc", likelihood=Gaussian())


@pytest.mark.parametrize("layer", ["embed", "qkv", "head"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_term_per_token(layer: str, fisher: str) -> None:
    """M counts the N·T terms of the loss; the gradient is that of a whole example."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    check(Tokens().double(), layer, x, fisher=fisher, likelihood=Categorical(dim=-1))


def test_masked_tokens_count_nowhere() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(), torch.randn(3, 5, 3).double()
    mask = torch.rand(3, 5) > 0.4
    mask[1] = False
    x[~mask] = float("inf")
    likelihood = Categorical(dim=-1)
    got, left, right = record(
        net, "0", x, fisher="mc", likelihood=likelihood, mask=lambda args, kwargs, out: mask,
        generator=Generator().manual_seed(3),
    )  # fmt: skip
    x = torch.where(mask.unsqueeze(-1), x, 0.0)
    vectors = output_gradients(likelihood, net(x), "mc", seed=3, mask=mask)
    expected = mean_squares(net, find_layers(net)["0"], x, vectors, float(mask.sum()), left, right)
    assert relative(got["rotated"], expected) < 1e-10


def test_examples_in_the_second_dimension() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x.transpose(0, 1)))
            return self.head(h.transpose(0, 1).flatten(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    check(TimeFirst().double(), "layer", x, fisher="exact", likelihood=Gaussian())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layer", ["attention.q_proj", "attention.v_proj", "attention.out_proj"])
def test_projections_of_attention(layer: str, batch_first: bool) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            h = self.attention(x, x, x)[0]
            return self.head((h if batch_first else h.transpose(0, 1)).flatten(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    check(Attends().double(), layer, x, fisher="exact", likelihood=Gaussian())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)
    x = torch.randn(4, 2, 6, 6)
    net = OneLayer(layer, 48)
    torch.manual_seed(1)
    wide, _, _ = record(net.double(), "layer", x.double(), fisher="exact", likelihood=Gaussian())
    torch.manual_seed(1)
    adapter = find_layers(net.to(dtype))["layer"]
    left, right = (basis.float() for basis in bases(adapter))
    rotated = RotatedSquares(adapter)
    rotated.rotate(left, right)
    recorder = Recorder(net, {"layer": adapter}, fisher="exact", likelihood="gaussian", extra={"layer": {"S": rotated}})
    net(x.to(dtype))
    total, scale = recorder.collect().scaled_sums()["layer"].extra["S"]
    assert total.dtype == torch.float32
    assert relative(total.double() * scale, wide["rotated"]) < 0.05


def test_an_adapter_with_statistics_of_its_own_does_not_inherit_pairs() -> None:
    class Doubled(LinearAdapter):
        """Sees something else than a Linear."""

        def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
            """Of twice the input."""
            return super().input_statistics(out, 2 * x, mask)

    class Renamed(LinearAdapter):
        """Sees the same."""

    assert not Doubled.has_pairs
    assert Renamed.has_pairs
