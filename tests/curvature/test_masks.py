"""Masks: excluded terms and positions are as if they had never been there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical, Gaussian, Recorder, factors, find_layers
from tests.curvature.models import Tokens, categorical, definition, mlp, relative


class Positionwise(nn.Module):
    """Tokens that do not see each other: what a mask excludes can then be left out of the data instead."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of every token."""
        return self.net(x)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_token_mask_equals_the_remaining_tokens(fisher: str) -> None:
    model = Positionwise().double()
    x, y = torch.randn(4, 5, 3, dtype=torch.float64), torch.randint(4, (4, 5))
    keep = torch.rand(4, 5) < 0.6
    x[~keep] = 1e3  # padding must not count
    y[~keep] = -100
    options: dict[str, Any] = {"likelihood": Categorical(dim=-1), "fisher": fisher}
    masked = Recorder(model, find_layers(model), mask=lambda args, kwargs, out: kwargs["keep"], **options)
    for part in range(2):  # two micro-batches of different token counts, both divided by the total
        rows = slice(2 * part, 2 * part + 2)
        logits = model(x[rows], keep=keep[rows])
        (functional.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum") / keep.sum()).backward()
    pending = masked.collect()
    masked.remove()
    assert pending.terms == int(keep.sum())
    assert {layer.positions for layer in pending.layers.values()} == {int(keep.sum())}

    plain = Recorder(model, find_layers(model), **options)
    functional.cross_entropy(model(x[keep].unsqueeze(0)).squeeze(0), y[keep]).backward()
    expected = plain.collect().factors()
    for name, got in pending.factors().items():
        assert relative(got.A, expected[name].A) < 1e-12
        assert relative(got.G, expected[name].G) < 1e-12


def test_masked_terms_where_positions_see_each_other() -> None:
    """Whole sequences masked: the rest by the definition."""
    model = Tokens().double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    keep = torch.tensor([True, False, True, True])
    mask = keep.unsqueeze(1).expand(4, 5)
    got = factors(model, x, likelihood=Categorical(dim=-1), fisher="exact", mask=lambda args, kwargs, out: mask)
    for name, expected in definition(model, x[keep], categorical(-1), terms=15).items():
        assert relative(got[name].A, expected.A) < 1e-6
        assert relative(got[name].G, expected.G) < 1e-6


def test_example_mask_covers_tokens() -> None:
    """A mask over examples excludes all positions of a layer that sees tokens."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 4)).double()
    x, keep = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([True, False, True, True])
    got = factors(model, x, likelihood="categorical", fisher="exact", mask=lambda args, kwargs, out: keep)
    expected = factors(model, x[keep], likelihood="categorical", fisher="exact")
    for name in expected:
        assert relative(got[name].A, expected[name].A) < 1e-12
        assert relative(got[name].G, expected[name].G) < 1e-12


def test_example_mask_covers_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4)).double()
    x, keep = torch.randn(5, 2, 4, 5, dtype=torch.float64), torch.tensor([True, False, True, True, False])
    got = factors(model, x, likelihood="categorical", fisher="exact", mask=lambda args, kwargs, out: keep)
    expected = factors(model, x[keep], likelihood="categorical", fisher="exact")
    for name in expected:
        assert relative(got[name].A, expected[name].A) < 1e-12
        assert relative(got[name].G, expected[name].G) < 1e-12


def test_everything_masked() -> None:
    model = mlp()
    recorder = Recorder(
        model, find_layers(model), mask=lambda args, kwargs, out: torch.zeros(len(out), dtype=torch.bool)
    )
    model(torch.randn(6, 5))
    pending = recorder.collect()
    assert pending.terms == 0
    assert pending.factors() == {}


def test_mask_that_does_not_fit() -> None:
    model = mlp()
    recorder = Recorder(model, find_layers(model), mask=lambda args, kwargs, out: torch.ones(6))
    with pytest.raises(TypeError, match="mask: expected a bool tensor"):
        model(torch.randn(6, 5))
    recorder.remove()
    recorder = Recorder(
        model,
        find_layers(model),
        likelihood=Gaussian(),
        mask=lambda args, kwargs, out: torch.ones(5, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="mask: expected the leading dimensions"):
        model(torch.randn(6, 5))
    assert not recorder.is_open
