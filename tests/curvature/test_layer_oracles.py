"""Factors of every layer type, Fisher type and sharing mode against dense Jacobians of single examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor, nn

from kronfac.curvature import Gaussian, KroneckerFactors, Recorder, adapter_for, factors, find_layers
from tests.curvature.models import relative
from tests.curvature.oracle import OneLayer, oracle

VARIANCE, TERMS, N = 0.7, 2, 4


@dataclass(frozen=True)
class Case:
    """A layer and the shape of one example."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axis: int = 1
    indices: int = 0


CASES = {
    "Linear": Case(lambda: nn.Linear(3, 4), (3,), -1),
    "Linear on tokens": Case(lambda: nn.Linear(3, 4), (5, 3), -1),
    "Linear on a grid": Case(lambda: nn.Linear(3, 2, bias=False), (2, 3, 3), -1),
    "Conv1d": Case(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (2, 9)),
    "Conv1d same reflect": Case(lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 6)),
    "Conv1d depthwise": Case(lambda: nn.Conv1d(3, 3, 3, groups=3, padding=1), (3, 5)),
    "Conv2d": Case(lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 5, 4)),
    "Conv2d groups": Case(lambda: nn.Conv2d(4, 6, (2, 3), groups=2, dilation=(1, 2), padding="same"), (4, 4, 5)),
    "Conv2d depthwise": Case(lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2, bias=False), (3, 5, 5)),
    "Conv2d circular groups": Case(lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="circular"), (4, 4, 3)),
    "Conv3d": Case(lambda: nn.Conv3d(2, 2, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 2)),
    "Conv3d groups": Case(lambda: nn.Conv3d(2, 4, 2, groups=2, padding_mode="replicate", padding=1), (2, 2, 3, 2)),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "ConvTranspose2d": Case(
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)), (2, 3, 2)
    ),
    "ConvTranspose2d groups": Case(
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, dilation=(2, 1), padding=2, bias=False), (4, 4, 5)
    ),
    "ConvTranspose3d": Case(lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (2, 2, 2, 1)),
    "Embedding": Case(lambda: nn.Embedding(5, 3), (6,), -1, 5),
}


class Exhaustive(Gaussian):
    """As many draws as there are directions, one along each: their average is the expectation itself."""

    _columns: Iterator[Tensor]

    def sample_gradients(self, logits: Tensor, generator: Generator, mask: Tensor | None) -> Tensor:
        """The next direction."""
        column = next(self._columns, None) if hasattr(self, "_columns") else None
        if column is None:
            self._columns = self.exact_gradients(logits, mask)
            column = next(self._columns)
        return column * math.sqrt(3)


def data(case: Case) -> Tensor:
    torch.manual_seed(0)
    if case.indices:
        return torch.randint(case.indices, (N, *case.shape))
    return torch.randn(N, *case.shape, dtype=torch.float64)


def model_of(case: Case) -> OneLayer:
    torch.manual_seed(1)
    layer = case.layer().double()
    return OneLayer(layer, layer(data(case)).flatten(1).shape[1]).double()


def square(fisher: str, y: Tensor) -> Callable[[Tensor, int], Tensor]:
    """E[g gᵀ] at the logits of an example: the Hessian, or the outer product at the target."""

    def at(logits: Tensor, index: int) -> Tensor:
        if fisher != "empirical":
            return torch.eye(3, dtype=logits.dtype) / VARIANCE
        g = (logits[0] - y[index]) / VARIANCE
        return torch.outer(g, g)

    return at


def check(got: KroneckerFactors, expected: KroneckerFactors, case: Case) -> None:
    A = expected.A.diagonal() if case.indices else expected.A
    assert got.A.shape == A.shape
    assert got.G.shape == expected.G.shape
    assert relative(got.A, A) < 1e-10
    assert relative(got.G, expected.G) < 1e-10


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_factors_equal_their_definition(name: str, sharing: str) -> None:
    """fisher="exact", "mc" in expectation, and "empirical" by closed form and from the user's own backward."""
    case = CASES[name]
    x, y = data(case), torch.randn(N, 3, dtype=torch.float64)
    model = model_of(case)
    adapter = adapter_for(model.layer)
    assert adapter is not None

    def by_definition(fisher: str) -> KroneckerFactors:
        return oracle(model, adapter, x, axis=case.axis, sharing=sharing, terms=N * TERMS, square=square(fisher, y))

    gaussian = Gaussian(variance=VARIANCE, terms=TERMS)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    check(
        factors(model, x, likelihood=gaussian, fisher="exact", sharing=sharing)["layer"], by_definition("exact"), case
    )
    draws = factors(
        model, batches, likelihood=Exhaustive(VARIANCE, TERMS), fisher="mc", fisher_samples=3, sharing=sharing
    )
    check(draws["layer"], by_definition("exact"), case)
    expected = by_definition("empirical")
    check(factors(model, batches, likelihood=gaussian, fisher="empirical", sharing=sharing)["layer"], expected, case)

    recorder = Recorder(model, find_layers(model), likelihood=gaussian, fisher="empirical", sharing=sharing)
    ((model(x) - y).square().sum() / (2 * VARIANCE * N * TERMS)).backward()
    check(recorder.collect().factors()["layer"], expected, case)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["Linear on tokens", "Embedding"])
def test_token_masks(name: str, sharing: str) -> None:
    """Masked positions are left out of every sum, an example without any left altogether."""
    case = CASES[name]
    x = data(case)
    T = x.shape[1]

    class Tokenwise(OneLayer):
        """Logits per token that depend on all tokens."""

        def after(self, y: Tensor) -> Tensor:
            return self.head(torch.tanh(y).flatten(1)).unsqueeze(1).expand(-1, T, -1)

    torch.manual_seed(1)
    layer = case.layer().double()
    model = Tokenwise(layer, layer(x).flatten(1).shape[1]).double()
    keep = torch.rand(N, T, generator=Generator().manual_seed(4)) < 0.6
    keep[0], keep[1] = True, False
    got = factors(
        model,
        x,
        likelihood=Gaussian(variance=VARIANCE, terms=T),
        fisher="exact",
        sharing=sharing,
        mask=lambda args, kwargs, out: keep,
    )["layer"]
    adapter = adapter_for(layer)
    assert adapter is not None
    flat = OneLayer(layer, 1).double()
    flat.head = model.head
    # The T equal outputs of an example are one output of T times the curvature, of which the kept ones count.
    expected = oracle(
        flat,
        adapter,
        x,
        axis=-1,
        sharing=sharing,
        terms=int(keep.sum()),
        square=lambda logits, index: torch.eye(3, dtype=logits.dtype) * keep[index].sum() / VARIANCE,
        keep=keep,
    )
    check(got, expected, case)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_idx_counts_nowhere(sharing: str) -> None:
    """Trap 9, for embeddings: as if the padded positions had been masked."""
    case = CASES["Embedding"]
    x = data(case)
    model = model_of(case)
    assert isinstance(model.layer, nn.Embedding)
    keep = x != 2
    assert 0 < keep.sum() < keep.numel()
    adapter = adapter_for(model.layer)
    assert adapter is not None
    expected = oracle(
        model, adapter, x, axis=-1, sharing=sharing, terms=N, square=square("exact", torch.empty(0)), keep=keep
    )
    model.layer.padding_idx = 2
    got = factors(model, x, likelihood=Gaussian(VARIANCE), fisher="exact", sharing=sharing)["layer"]
    check(got, expected, case)
    assert got.A[2] == 0


def test_output_size_of_a_transposed_convolution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, output_size=[6, 5]).flatten(1)

    net, x = Net(), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    got = factors(net, x, likelihood="gaussian", fisher="exact")["layer"]
    other = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=(1, 0), dtype=torch.float64)
    net.layer = other
    net.forward = lambda x: other(x).flatten(1)  # type: ignore[method-assign]
    expected = factors(net, x, likelihood="gaussian", fisher="exact")["layer"]
    assert net(x).shape[1] == 3 * 6 * 5
    assert relative(got.A, expected.A) == 0
    assert relative(got.G, expected.G) == 0
