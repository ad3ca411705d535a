"""Trials are what a user would get by hand, and leave no trace."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kronfac.optim import KFAC, Monitor, RangeResult, range_finder
from tests.optim.models import frozen_state, mlp, same_tree, train_step, vectors


def noisy_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def loader(count: int = 64) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*vectors(count, 4, 3)), 8, shuffle=True, generator=torch.Generator().manual_seed(5))


def everything(model: nn.Module, optimizer: Any) -> Any:
    state = frozen_state(optimizer)
    numpy_state = np.random.get_state()
    return [
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        state,
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        [numpy_state[0], torch.from_numpy(numpy_state[1].astype("int64")), *numpy_state[2:]],
        repr(random.getstate()),
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "kfac": lambda model: KFAC(model, 0.1, inverse_every=2),
    "eigen": lambda model: KFAC(model, 0.1, solve="eigen", fisher="empirical"),
    "stale": lambda model: KFAC(model, 0.1, inverse_every=2, max_staleness=3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize(("name", "trained"), [("kfac", 0), ("sgd", 0), *((name, 3) for name in OPTIMIZERS)])
def test_nothing_has_happened_afterwards(name: str, trained: int) -> None:
    model, data = noisy_model(), loader()
    optimizer = OPTIMIZERS[name](model)
    for _, (x, y) in zip(range(trained), data, strict=False):
        train_step(model, optimizer, x, y)
    grads = [p.grad for p in model.parameters()]
    before, stream = everything(model, optimizer), data.generator.get_state()
    result = range_finder(model, optimizer, functional.cross_entropy, data, low=1e-3, high=1e3, count=3, steps=2)
    assert len(result.values) == 3
    assert same_tree(before, everything(model, optimizer))
    assert torch.equal(stream, data.generator.get_state())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    results = []
    for look in (False, True):
        torch.manual_seed(2)
        model, data = noisy_model(), loader()
        optimizer = KFAC(model, 0.1, seed=0, max_staleness=1, inverse_every=2)
        for epoch in range(2):
            for x, y in data:
                train_step(model, optimizer, x, y)
            if look and epoch == 0:
                for option in ("lr", "damping", "kl_clip"):
                    range_finder(model, optimizer, functional.cross_entropy, data, option=option, count=2, steps=2)
        results.append(everything(model, optimizer))
    assert same_tree(*results)


@pytest.mark.parametrize("option", ["lr", "damping", "kl_clip"])
def test_losses_are_those_of_trials_by_hand(option: str) -> None:
    model = mlp(4, 5, 3)
    data = [vectors(8, 4, 3) for _ in range(6)]
    optimizer = KFAC(model, 0.1, fisher="exact", inverse_every=3)
    for batch in data[:2]:
        train_step(model, optimizer, *batch)
    result = range_finder(
        model, optimizer, functional.cross_entropy, data, option=option, low=1e-3, high=1.0, count=4, steps=5
    )
    torch.testing.assert_close(result.values, torch.tensor([1e-3, 1e-2, 1e-1, 1.0], dtype=torch.float64))
    for value, loss, clipped in zip(result.values.tolist(), result.losses.tolist(), result.clipped, strict=True):
        twin = copy.deepcopy(model)
        other = KFAC(twin, 0.1, fisher="exact", inverse_every=3)
        other.load_state_dict(optimizer.state_dict())
        other.param_groups[0][option] = value
        if option == "damping":
            other.param_groups[0]["inverse_every"] = 1
        losses, clips = [], []
        for batch in data[:5]:
            losses.append(train_step(twin, other, *batch))
            (scale,) = other.clip_scales
            clips.append(float(scale is not None and scale < 1))
        assert loss == pytest.approx(sum(losses[2:]) / 3, rel=1e-12)
        assert float(clipped) == pytest.approx(sum(clips) / 5)
    with torch.no_grad():
        start = [float(functional.cross_entropy(model(x), y)) for x, y in data[2:5]]
    assert result.start == pytest.approx(sum(start) / 3)
    assert result.suggestion == float(result.values[result.losses.argmin()])


def test_the_rate_it_suggests_for_a_quadratic_is_the_best_one() -> None:
    """On ½·c·w² a step of rate 1/c ends in the minimum, and rates above 2/c diverge."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x, y = torch.full((4, 1), 2.0), torch.zeros(4, 1)
    data = [(x, y)] * 4

    def half_square(out: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (out - target).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = range_finder(model, optimizer, half_square, data, low=0.25e-2, high=0.25e2, count=5, steps=4)
    assert result.suggestion == pytest.approx(0.25)  # c = 4
    assert result.losses[3] > result.start
    assert float(model.weight.detach()) == 1.0


def test_what_diverges_is_infinite_and_silent(recwarn: pytest.WarningsRecorder) -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, kl_clip=None)
    data = [vectors(8, 4, 3) for _ in range(6)]

    def squares(out: Tensor, target: Tensor) -> Tensor:
        return out.square().mean()

    result = range_finder(model, optimizer, squares, data, low=1e20, high=1e30, count=2, steps=6)
    assert result.losses.tolist() == [math.inf, math.inf]
    assert result.suggestion is None
    assert optimizer.skipped_steps == 0
    assert not recwarn.list


def test_monitors_do_not_see_trials_but_what_comes_after() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1)
    seen: list[Any] = []
    monitor = Monitor(optimizer, seen.append, every=1, time_phases=True)
    batch = vectors(8, 4, 3)
    train_step(model, optimizer, *batch)
    seconds, clips = optimizer.diagnostics()["seconds"], list(optimizer.clip_scales)
    range_finder(model, optimizer, functional.cross_entropy, [batch] * 2, count=2, steps=2)
    assert len(seen) == 1
    assert optimizer.diagnostics()["seconds"] == seconds
    assert optimizer.clip_scales[0] is clips[0]
    train_step(model, optimizer, *batch)
    assert [report["step"] for report in seen] == [1, 2]
    monitor.close()
    train_step(model, optimizer, *batch)
    assert len(seen) == 2


def test_everything_is_put_back_when_something_is_raised() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(8, 4, 3))
    data = [vectors(8, 4, 3) for _ in range(4)]
    before = everything(model, optimizer)

    def failing() -> Iterator[tuple[Tensor, Tensor]]:
        yield vectors(8, 4, 3)
        raise OSError("the disk is gone")

    calls = []

    def loss(out: Tensor, target: Tensor) -> Tensor:
        calls.append(out)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return functional.cross_entropy(out, target)

    with pytest.raises(OSError, match="disk"):
        range_finder(model, optimizer, functional.cross_entropy, failing(), steps=2)
    assert same_tree(before, everything(model, optimizer))
    with pytest.raises(KeyboardInterrupt):
        range_finder(model, optimizer, loss, data, steps=4)
    assert same_tree(before, everything(model, optimizer))


def test_bad_arguments() -> None:
    model = mlp(4, 3)
    optimizer, sgd = KFAC(model, lambda step: 0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    data = [vectors(8, 4, 3) for _ in range(3)]
    arguments: dict[str, Any]
    for chosen, arguments, error, match in (
        (sgd, {"option": "momentum"}, ValueError, "option: expected one of 'lr', 'damping', 'kl_clip'"),
        (sgd, {"option": "damping"}, TypeError, "expected a kronfac.KFAC for option='damping', got a SGD"),
        (sgd, {"low": 0.0}, ValueError, "low"),
        (sgd, {"low": 1.0, "high": 0.5}, ValueError, "high: expected a number > 1"),
        (sgd, {"count": 1}, ValueError, "count: expected an integer >= 2"),
        (sgd, {"steps": 1}, ValueError, "steps: expected an integer >= 2"),
        (sgd, {"steps": 4}, ValueError, "expected at least steps=4 batches, got 3"),
        (optimizer, {"steps": 2}, ValueError, r"params\[0\]: lr: expected a number, got a callable"),
    ):
        with pytest.raises(error, match=match):
            range_finder(model, chosen, functional.cross_entropy, data, **arguments)
    with pytest.raises(TypeError, match="expected pairs"):
        range_finder(model, sgd, functional.cross_entropy, [torch.zeros(2, 4)] * 3, steps=2)  # type: ignore[arg-type]


def test_the_plot_shows_values_losses_and_the_suggestion() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    result = RangeResult(
        "lr",
        torch.tensor([0.1, 1.0, 10.0]),
        torch.tensor([1.0, 0.5, math.inf]),
        1.2,
        torch.tensor([0.0, 1.0, 1.0]),
        1.0,
    )
    axes = result.plot(pyplot.subplots()[1])
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "lr"
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert pytest.approx(drawn[0]) == [0.1, 1.0]
    assert [1.0, 1.0] in drawn
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["free", "KL clip acts", "no step", "1"]
    pyplot.close("all")
