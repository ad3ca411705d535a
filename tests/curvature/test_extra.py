"""Further statistics are carried as A and G are: forwards, calls, draws, loss scales, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from kronfac.curvature import ExtraStatistic, LayerAdapter, Recorder, find_layers
from kronfac.curvature.forward import Call
from tests.curvature.models import mlp
from tests.curvature.test_process_group import Routed, data
from tests.curvature.test_process_group import model as routed
from tests.processes import run_ranks


class Squares(ExtraStatistic):
    """Σ over examples of the squared gradient of the weight, for plain Linear layers."""

    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """Two dimensions only."""
        moment = (g.square().mT @ call.inputs.square()) * scale
        return moment if out is None else out.add_(moment)


class Total(ExtraStatistic):
    """Σ of the gradients."""

    per, degree, keeps_input = "positions", 1, False

    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """Two dimensions only."""
        return g.sum(0) * scale if out is None else out.add_(g.sum(0), alpha=scale)


def statistics(layers: dict[str, LayerAdapter]) -> dict[str, dict[str, ExtraStatistic]]:
    return {
        name: {"squares": Squares((a.out_features, a.in_features)), "total": Total((a.out_features,))}
        for name, a in layers.items()
    }


def watch(net: nn.Module, names: tuple[str, ...] = ("squares",), **options: Any) -> Recorder:
    layers = find_layers(net)
    extra = {name: {key: some[key] for key in names} for name, some in statistics(layers).items()}
    return Recorder(net, layers, extra=extra, **options)


def averages(recorder: Recorder, **options: Any) -> dict[str, dict[str, Tensor]]:
    pending = recorder.collect(**options)
    assert pending.finite()
    return {
        name: {key: total * scale for key, (total, scale) in sums.extra.items()}
        for name, sums in pending.scaled_sums().items()
    }


def per_example(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients (N, *) of the negative log-likelihood of each example, by parameter."""

    def loss(parameters: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, parameters, (example.unsqueeze(0),))
        return functional.cross_entropy(logits, label.unsqueeze(0))

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return vmap(grad(loss), (None, 0, 0))(parameters, x, y)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp().double()


def batch(net: nn.Sequential, count: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, net[0].in_features, dtype=torch.float64), torch.randint(3, (count,))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_forwards_add_up_and_the_loss_scale_drops_out(net: nn.Sequential, reduction: str, loss_scale: float) -> None:
    recorder = watch(net, fisher="empirical", reduction=reduction)
    x, y = batch(net)
    for rows in (slice(0, 4), slice(4, 7)):
        loss = functional.cross_entropy(net(x[rows]), y[rows], reduction="sum")
        (loss * loss_scale / (len(x) if reduction == "mean" else 1)).backward()
    got = averages(recorder, loss_scale=loss_scale)
    each = per_example(net, x, y)
    assert got
    for name, some in got.items():
        torch.testing.assert_close(some["squares"], each[f"{name}.weight"].square().mean(0))


def test_degree_and_normalisation_are_the_statistics_own(net: nn.Sequential) -> None:
    recorder = watch(net, ("total",), fisher="empirical", reduction="mean")
    x, y = batch(net)
    (functional.cross_entropy(net(x), y) * 8).backward()
    each = per_example(net, x, y)
    got = averages(recorder, loss_scale=8.0)
    for name in ("0", "4"):
        torch.testing.assert_close(got[name]["total"], each[f"{name}.bias"].mean(0))


def test_draws_are_averaged(net: nn.Sequential) -> None:
    x, _ = batch(net)
    many = watch(net, fisher="mc", fisher_samples=3, generator=torch.Generator().manual_seed(5))
    net(x)
    got = averages(many)
    many.remove()
    one = watch(net, fisher="mc", generator=torch.Generator().manual_seed(5))
    singles = []
    for _ in range(3):
        net(x)
        singles.append(averages(one))
    for name, some in got.items():
        expected = torch.stack([single[name]["squares"] for single in singles]).mean(0)
        torch.testing.assert_close(some["squares"], expected)


def test_calls_of_a_layer_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(torch.tanh(self.inner(x))))  # type: ignore[no-any-return]

    net, x = Twice(), torch.randn(4, 3, dtype=torch.float64)
    recorder = watch(net, fisher="exact")
    net(x)
    assert averages(recorder)["inner"]["squares"].shape == (3, 3)


def test_one_that_was_not_taken_of_all_examples_is_left_out(net: nn.Sequential) -> None:
    recorder = watch(net, ("squares", "total"), fisher="exact")
    x, _ = batch(net)
    recorder.extra["0"]["squares"].available = False
    net(x)
    recorder.extra["0"]["squares"].available = True
    net(x)
    got = averages(recorder)
    assert set(got["0"]) == {"total"}
    assert set(got["2"]) == {"squares", "total"}


def test_inputs_are_kept_only_where_they_are_wanted(net: nn.Sequential) -> None:
    for names, kept in (((), False), (("total",), False), (("squares",), True)):
        recorder = watch(net, names, fisher="empirical")
        seen: list[Call] = []
        see = recorder.see

        def note(*args: Any, see: Any = see, recorder: Recorder = recorder, seen: list[Call] = seen) -> None:
            see(*args)
            assert recorder._forward is not None
            seen += recorder._forward.calls[args[0]]

        recorder.see = note  # type: ignore[method-assign]
        net(batch(net)[0])
        assert seen
        assert all((call.x is not None) == kept for call in seen)
        recorder.remove()


def test_an_input_that_changes_before_its_gradient_arrives_is_refused() -> None:
    class Spoiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.0
            y = self.layer(h)
            h.add_(1.0)
            return y  # type: ignore[no-any-return]

    net = Spoiling()
    recorder = watch(net, fisher="exact")
    with recorder.suspend():
        net(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="'layer' was modified in place"):
        net(torch.randn(2, 3))


def test_a_sum_that_is_not_finite_is_noticed(net: nn.Sequential) -> None:
    recorder = watch(net, fisher="exact")
    net(batch(net)[0])
    pending = recorder.collect()
    pending.layers["0"].extra["squares"][0, -1] = float("inf")
    assert not pending.finite()


def _work(rank: int, folder: Path) -> None:
    x, y = data()
    x, y = (x[:5], y[:5]) if rank == 0 else (x[5:], y[5:])
    net: Routed = routed()
    recorder = watch(net, ("squares", "total"), fisher="empirical", reduction="sum")
    functional.cross_entropy(net(x), y, reduction="sum").backward()
    pending = recorder.collect()
    pending.all_reduce()
    sums = {n: {k: t * s for k, (t, s) in some.extra.items()} for n, some in pending.scaled_sums().items()}
    # A statistic that one rank could not take is left out by all.
    recorder.extra["body"]["squares"].available = rank == 0
    functional.cross_entropy(net(x), y, reduction="sum").backward()
    pending = recorder.collect()
    pending.all_reduce()
    torch.save((sums, {name: sorted(layer.extra) for name, layer in pending.layers.items()}), folder / f"{rank}.pt")


def test_two_processes_with_different_layers(tmp_path: Path) -> None:
    run_ranks(_work, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, y = data()
    net = routed()
    recorder = watch(net, ("squares", "total"), fisher="empirical", reduction="sum")
    for rows in (slice(0, 5), slice(5, 9)):
        functional.cross_entropy(net(x[rows]), y[rows], reduction="sum").backward()
    expected = averages(recorder)
    for sums, left in ranks:
        assert set(sums) == set(expected) == {"body", "rare", "head"}
        for name, some in expected.items():
            for key, value in some.items():
                torch.testing.assert_close(sums[name][key], value)
        assert left == {"body": ["total"], "rare": ["squares", "total"], "head": ["squares", "total"]}
