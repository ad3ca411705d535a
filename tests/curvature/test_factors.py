"""`kronfac.curvature.factors`: data in every form, and a model left as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kronfac.curvature import KroneckerFactors, Recorder, factors, find_layers
from tests.curvature.models import mlp, relative


def same(one: dict[str, KroneckerFactors], other: dict[str, KroneckerFactors]) -> bool:
    return one.keys() == other.keys() and all(
        relative(a, b) < 1e-12 for name in one for a, b in zip(one[name], other[name], strict=True)
    )


class TwoInputs(nn.Module):
    """Takes its input in two halves."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Logits."""
        return self.net(torch.cat([left, right], 1))


def test_forms_of_data() -> None:
    model = mlp().double()
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(4, (7,))
    for fisher in ("exact", "empirical"):
        expected = factors(model, (x, y), likelihood="categorical", fisher=fisher)
        loader = DataLoader(TensorDataset(x, y), batch_size=3)
        forms: list[Any] = [
            [x, y],
            [(x[:2], y[:2]), [x[2:], y[2:]]],
            loader,
            iter(loader),
            next(iter(DataLoader(TensorDataset(x, y), batch_size=7))),
        ]
        if fisher == "exact":
            forms += [x, (x,), [(x[:2],), (x[2:],)]]
        for data in forms:
            assert same(factors(model, data, likelihood="categorical", fisher=fisher), expected)
        two = TwoInputs(model)
        pieces = (x[:, :2], x[:, 2:])
        for inputs in (pieces, {"left": pieces[0], "right": pieces[1]}):
            got = factors(two, (inputs, y), likelihood="categorical", fisher=fisher)
            assert same({name.removeprefix("net."): pair for name, pair in got.items()}, expected)


def test_equals_what_an_optimizer_records() -> None:
    model, x = mlp().double(), torch.randn(7, 5, dtype=torch.float64)
    recorder = Recorder(model, find_layers(model), fisher="exact")
    model(x)
    assert same(factors(model, x, likelihood="categorical", fisher="exact"), recorder.collect().factors())


class Counting(nn.Module):
    """Counts its calls in a buffer, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        self.calls += 1
        return x


def test_nothing_changes() -> None:
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(inplace=True), Counting(), nn.Linear(6, 4)
    )
    model[2].eval()
    x, y = torch.randn(8, 5), torch.randint(4, (8,))
    model(x).sum().backward()
    recorder = Recorder(model, find_layers(model), fisher="exact")
    model(x)
    waiting = recorder.collect().factors()
    model(x)

    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    streams = torch.get_rng_state(), random.getstate(), str(np.random.get_state()), loader.generator.get_state()
    for fisher in ("mc", "exact", "empirical"):
        for data in (loader, DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)):
            with torch.no_grad():  # needs none of the caller's settings
                factors(model, data, likelihood="categorical", fisher=fisher)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert str(np.random.get_state()) == streams[2]
    assert torch.equal(loader.generator.get_state(), streams[3])
    # the recorder of an optimizer has seen its own forward and nothing else
    pending = recorder.collect()
    assert pending.terms == 8
    assert waiting.keys() == pending.factors().keys()


def test_not_recorded_even_where_recording_is_forced() -> None:
    model, x = mlp(), torch.randn(8, 5)
    recorder = Recorder(model, find_layers(model))
    with recorder.record():
        model(x[:3])
        factors(model, x, likelihood="categorical", fisher="mc")
    assert recorder.collect().terms == 3


def test_restored_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    with pytest.raises(RuntimeError, match="shapes"):
        factors(model, [(torch.randn(3, 5),), (torch.randn(3, 4),)], likelihood="categorical", fisher="mc")
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_seed() -> None:
    model, x = mlp(), torch.randn(8, 5)
    one, two, other = (factors(model, x, likelihood="categorical", fisher="mc", seed=s) for s in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)


def test_cutting_into_batches_does_not_matter_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    model(x)
    options = {"likelihood": "categorical", "fisher": "exact"}
    assert same(factors(model, x, **options), factors(model, [(x[:3],), (x[3:],)], **options))


def test_bad_arguments() -> None:
    model, x = mlp(), torch.randn(3, 5)
    with pytest.raises(ValueError, match="model: expected at least one trainable layer"):
        factors(nn.ReLU(), x, likelihood="categorical", fisher="mc")
    with pytest.raises(ValueError, match="data: expected at least one example"):
        factors(model, [], likelihood="categorical", fisher="mc")
    with pytest.raises(ValueError, match="data: expected at least one example"):
        factors(model, x[:0], likelihood="categorical", fisher="mc")
    with pytest.raises(ValueError, match="fisher: expected one of"):
        factors(model, x, likelihood="categorical", fisher="full")
    with pytest.raises(ValueError, match="sharing: expected one of 'expand', 'reduce', got 'average'"):
        factors(model, x, likelihood="categorical", fisher="mc", sharing="average")
    with pytest.raises(TypeError, match=r"data: expected batches \(inputs, targets\).*got a Tensor"):
        factors(model, x, likelihood="categorical", fisher="empirical")
    with pytest.raises(TypeError, match="data: expected a batch or an iterable of batches, got a int"):
        factors(model, 3, likelihood="categorical", fisher="mc")
    with pytest.raises(TypeError, match="data: expected inputs as a tensor, a tuple or a mapping"):
        factors(model, [("text", 1)], likelihood="categorical", fisher="mc")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        factors(model, x, likelihood="categorical", fisher="mc")
