"""Filter-normalised random directions (Li et al. 2018)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronfac.spectrum import random_directions
from tests.operators.cases import make_case
from tests.operators.state import unchanged


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.linear = nn.Linear(5, 3)
        self.norm = nn.LayerNorm((3, 2))
        self.batch = nn.BatchNorm2d(3)
        self.embed = nn.Embedding(7, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))


def _parts(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    sizes = [p.numel() for p in model.parameters()]
    named = zip(model.named_parameters(), vector.split(sizes), strict=True)
    return {name: part.view_as(p) for (name, p), part in named}


def test_each_filter_has_the_norm_of_the_models() -> None:
    model = _Layers().double()
    with torch.no_grad():
        model.linear.weight[1] = 0.0  # as pruned
    with unchanged(model):
        columns = random_directions(model, 3, seed=5)
    assert columns.shape == (sum(p.numel() for p in model.parameters()), 3)
    parameters = dict(model.named_parameters())
    for column in columns.mT:
        parts = _parts(model, column)
        for name in ("conv.weight", "linear.weight", "embed.weight"):
            for ours, own in zip(parts[name], parameters[name].detach(), strict=True):
                assert float(ours.norm()) == pytest.approx(float(own.norm()), rel=1e-12)
        # Output o of group g of a transposed convolution: the inputs of the group, its own second index.
        for group in range(2):
            for out in range(3):
                inputs = slice(2 * group, 2 * group + 2)
                ours, own = parts["up.weight"][inputs, out], parameters["up.weight"].detach()[inputs, out]
                assert float(ours.norm()) == pytest.approx(float(own.norm()), rel=1e-12)
        for name, part in parts.items():
            moves = name in ("conv.weight", "up.weight", "linear.weight", "embed.weight")
            assert bool(part.any()) == moves, name
        assert torch.isfinite(column).all()


def test_the_draw_itself_is_gaussian_and_seeded() -> None:
    model = nn.Linear(200, 50)
    one, two = random_directions(model, 2, seed=1).mT
    assert abs(float(one @ two) / float(one.norm() * two.norm())) < 0.05
    state = torch.get_rng_state()
    again = random_directions(model, 2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again[:, 0], one)
    assert torch.equal(random_directions(model, 1, seed=1)[:, 0], one)
    assert not torch.equal(random_directions(model, 1, seed=2)[:, 0], one)
    entries = one[:10_000].view(50, 200) / model.weight.detach().norm(dim=1, keepdim=True) * 200**0.5
    kurtosis = float(entries.pow(4).mean() / entries.pow(2).mean() ** 2)
    assert kurtosis == pytest.approx(3.0, abs=0.2)


def test_not_normalised() -> None:
    model = _Layers()
    columns = random_directions(model, 2, filter_normalised=False)
    assert columns.dtype == torch.float32
    for column in columns.mT:
        assert float(column.norm()) == pytest.approx(1.0, rel=1e-6)
        assert all(bool(part.any()) for part in _parts(model, column).values())


def test_chosen_parameters() -> None:
    case = make_case("mlp")
    columns = random_directions(case.model, 1, params=["2"])
    assert columns.shape == (3 * 6 + 3, 1)
    assert columns.dtype == torch.float64
    assert not columns[18:].any()


def test_refusals() -> None:
    model = nn.Linear(2, 2)
    broken = nn.Linear(2, 2)
    with torch.no_grad():
        broken.weight.fill_(torch.nan)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (3, {}, TypeError, "model: expected a torch.nn.Module"),
        (model, {"count": 0}, ValueError, "count: expected at least 1"),
        (model, {"seed": -1}, ValueError, "seed: expected an integer in"),
        (model, {"params": ["bias"]}, ValueError, "params: none of the chosen parameters has filters"),
        (broken, {}, ValueError, "model: the weights contain NaN"),
    ]
    for module, options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.random_directions: " + match):
            random_directions(module, **options)
