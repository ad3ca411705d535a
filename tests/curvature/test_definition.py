"""Exact factors against their definition, example by example in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kronfac.curvature import Bernoulli, Categorical, Gaussian, Likelihood, Recorder, factors, find_layers
from tests.curvature.models import (
    NegativeLogLikelihood,
    Tokens,
    bernoulli,
    categorical,
    convnet,
    definition,
    gaussian,
    mlp,
    relative,
)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (5,), 1),
    "convnet": (convnet, (2, 7, 6), 1),
    "tokens": (Tokens, (5, 3), 5),
}
LIKELIHOODS: dict[str, tuple[Likelihood, NegativeLogLikelihood]] = {
    "categorical": (Categorical(dim=-1), categorical(-1)),
    "gaussian": (Gaussian(variance=0.7), gaussian(0.7)),
    "bernoulli": (Bernoulli(), bernoulli),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", MODELS)
def test_exact_factors_equal_their_definition(name: str, likelihood: str) -> None:
    make, shape, positions = MODELS[name]
    model, x = make().double(), torch.randn(6, *shape, dtype=torch.float64)
    ours, nll = LIKELIHOODS[likelihood]
    # Only the categorical likelihood takes each token for a term by itself.
    terms = 6 * (positions if likelihood == "categorical" else 1)
    expected = definition(model, x, nll, terms)
    for data in (x, [(x[:1],), (x[1:4],), (x[4:],)]):
        got = factors(model, data, likelihood=ours, fisher="exact")
        assert set(got) == set(expected)
        for layer, (A, G) in got.items():
            assert A.dtype == G.dtype == torch.float64
            assert relative(A, expected[layer].A) < 1e-6
            assert relative(G, expected[layer].G) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_float32_models(name: str) -> None:
    make, shape, positions = MODELS[name]
    model, x = make(), torch.randn(6, *shape)
    got = factors(model, x, likelihood=Categorical(dim=-1), fisher="exact")
    expected = definition(model.double(), x.double(), categorical(-1), 6 * positions)
    for layer, (A, G) in got.items():
        assert A.dtype == G.dtype == torch.float32
        assert relative(A.double(), expected[layer].A) < 1e-5
        assert relative(G.double(), expected[layer].G) < 1e-5


def test_class_dimension_1() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2)).double()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    expected = definition(model, x, categorical(1), terms=4 * 2 * 3)
    for layer, got in factors(model, x, likelihood=Categorical(dim=1), fisher="exact").items():
        assert relative(got.A, expected[layer].A) < 1e-6
        assert relative(got.G, expected[layer].G) < 1e-6


def test_terms_leave_the_product_of_a_mean_loss_alone() -> None:
    """A loss averaged over N·T·C elements: T terms per example of variance C/2, or one of variance T·C/2."""
    model, x = Tokens().double(), torch.randn(4, 5, 3, dtype=torch.float64)
    one = factors(model, x, likelihood=Gaussian(variance=5 * 4 / 2), fisher="exact")
    other = factors(model, x, likelihood=Gaussian(variance=4 / 2, terms=5), fisher="exact")
    for layer in one:
        assert not torch.allclose(one[layer].A, other[layer].A)
        assert relative(torch.kron(*one[layer]), torch.kron(*other[layer])) < 1e-12


class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.twice(torch.tanh(self.twice(x)))


def test_layer_used_twice_counts_both_uses() -> None:
    model, x = Tied().double(), torch.randn(9, 4, dtype=torch.float64)
    recorder = Recorder(model, find_layers(model), fisher="exact")
    model(x)
    statistics = recorder.collect().layers["twice"]
    assert statistics.positions == 18

    # The same function with two separate layers: sums over both uses.
    apart = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    for layer in (apart[0], apart[2]):
        layer.load_state_dict(model.twice.state_dict())
    sums = Recorder(apart, find_layers(apart), fisher="exact")
    apart(x)
    separate = sums.collect().layers
    torch.testing.assert_close(statistics.A_sum, separate["0"].A_sum + separate["2"].A_sum)
    torch.testing.assert_close(statistics.G_sum, separate["0"].G_sum + separate["2"].G_sum)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 3, 1, 5)])
def test_leading_dimensions_of_linear_inputs(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(5, 3).double()
    adapter = find_layers(layer)[""]
    x, g = torch.randn(*shape, dtype=torch.float64), torch.randn(*shape[:-1], 3, dtype=torch.float64)
    rows = torch.cat([x.reshape(-1, 5), torch.ones(x.numel() // 5, 1, dtype=x.dtype)], 1)
    torch.testing.assert_close(adapter.input_statistics(None, x, None), rows.T @ rows)
    torch.testing.assert_close(
        adapter.output_statistics(None, g, None, 0.5), 0.5 * g.reshape(-1, 3).T @ g.reshape(-1, 3)
    )
    assert adapter.positions(g.shape, None) == math.prod(shape[:-1])
