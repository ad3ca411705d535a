"""The loss along directions: against direct evaluation, closed forms, and itself after an interruption."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import kronfac
from kronfac.operators import hessian
from kronfac.spectrum import _resume, eigsh, landscape, random_directions
from tests.operators.cases import CASES, Case, dense_hessian, make_case
from tests.operators.state import unchanged


def _direct(case: Case, rows: Tensor, coefficients: tuple[float, ...], inputs: Tensor, targets: Tensor) -> float:
    """The loss with the parameters replaced, in eval mode, by torch alone."""
    vector = sum(a * row for a, row in zip(coefficients, rows, strict=True))
    assert isinstance(vector, Tensor)
    values, start = {}, 0
    for name, parameter in case.model.named_parameters():
        end = start + parameter.numel()
        values[name] = parameter.detach() + vector[start:end].view_as(parameter)
        start = end
    modes = [(module, module.training) for module in case.model.modules()]
    case.model.eval()
    with torch.no_grad():
        loss = case.loss_fn(functional_call(case.model, values, (inputs,)), targets)
    for module, mode in modes:
        module.training = mode
    return float(loss)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_plane_against_direct_evaluation(name: str) -> None:
    case = make_case(name)
    case.model.train()
    rows = torch.randn(2, _size(case.model), dtype=torch.float64)
    batches = [(case.inputs[:5], case.targets[:5]), (case.inputs[5:], case.targets[5:])]
    calls: list[tuple[int, int | None]] = []
    with unchanged(case.model):
        result = landscape(
            case.model,
            case.loss_fn,
            batches,
            rows.mT,
            radius=(0.5, 0.2),
            points=(5, 4),
            progress=lambda done, total: calls.append((done, total)),
        )
    assert [tuple(axis.shape) for axis in result.coordinates] == [(5,), (4,)]
    np.testing.assert_array_equal(result.coordinates[0].numpy(), [-0.5, -0.25, 0.0, 0.25, 0.5])
    weights = [5, len(case.inputs) - 5]
    for i, a in enumerate(result.coordinates[0].tolist()):
        for j, b in enumerate(result.coordinates[1].tolist()):
            expected = sum(w * _direct(case, rows, (a, b), *batch) for w, batch in zip(weights, batches, strict=True))
            assert float(result.losses["loss"][i, j]) == pytest.approx(expected / sum(weights), rel=1e-12)
    assert result.evaluated.all()
    assert not result.interrupted
    assert result.evaluations == 20 + 1  # an even number of points misses the centre
    assert calls == [(done, 20) for done in range(1, 21)]
    assert result.lengths == pytest.approx(rows.norm(dim=1).tolist())


def test_quadratic_in_closed_form() -> None:
    # Linear regression: the loss along any direction is the parabola of slope and curvature, exactly.
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    rows = torch.randn(2, 8, dtype=torch.float64)
    options: dict[str, Any] = {"points": 7, "radius": 2.0, "curvature": True}
    line = landscape(model, functional.mse_loss, {"train": (x, y), "half": (x[:3], y[:3])}, rows[0], **options)
    assert line.slopes is not None
    assert line.curvatures is not None
    for name, count in (("train", 7), ("half", 3)):
        a = torch.cat([x[:count], torch.ones(count, 1, dtype=torch.float64)], dim=1)
        weight = torch.cat([model.weight, model.bias[:, None]], dim=1).detach()
        turned = torch.cat([rows[0, :6].view(2, 3), rows[0, 6:, None]], dim=1)
        error, change = a @ weight.mT - y[:count], a @ turned.mT
        assert float(line.slopes[name]) == pytest.approx(float(2 * (error * change).mean()))
        assert float(line.curvatures[name]) == pytest.approx(float(2 * change.square().mean()))
        steps = line.coordinates[0]
        parabola = line.centre[name] + steps * line.slopes[name][0] + 0.5 * steps**2 * line.curvatures[name][0, 0]
        torch.testing.assert_close(line.losses[name], parabola, rtol=1e-12, atol=0)
    plane = landscape(model, functional.mse_loss, (x, y), rows.mT, **options)
    assert plane.slopes is not None
    assert plane.curvatures is not None
    a, b = torch.meshgrid(*plane.coordinates, indexing="ij")
    points = torch.stack([a, b], dim=-1)
    slope, bend = plane.slopes["loss"], plane.curvatures["loss"]
    quadratic = plane.centre["loss"] + points @ slope + 0.5 * ((points @ bend) * points).sum(-1)
    torch.testing.assert_close(plane.losses["loss"], quadratic, rtol=1e-12, atol=0)
    assert plane.products == 2
    assert line.products == 2  # one direction, two data sets


def test_second_difference_is_the_eigenvalue() -> None:
    case = make_case("mlp")
    top = eigsh(hessian(case.model, case.loss_fn, (case.inputs, case.targets)), 2, tol=1e-10)
    dense = torch.linalg.eigvalsh(dense_hessian(case.model, case.loss_fn, case.inputs, case.targets))
    result = landscape(
        case.model, case.loss_fn, (case.inputs, case.targets), top.vectors, radius=2e-3, points=3, curvature=True
    )
    losses, step = result.losses["loss"], 2e-3
    assert result.curvatures is not None
    for axis, expected in ((0, top.values[0]), (1, top.values[1])):
        line = losses[:, 1] if axis == 0 else losses[1, :]
        second = float(line[0] - 2 * line[1] + line[2]) / step**2
        assert second == pytest.approx(float(expected), rel=1e-4)
        assert float(result.curvatures["loss"][axis, axis]) == pytest.approx(float(expected), rel=1e-9)
        assert float((dense - expected).abs().min()) < 1e-8
    assert abs(float(result.curvatures["loss"][0, 1])) < 1e-8


def test_forms_of_directions_agree() -> None:
    case = make_case("mlp")
    data = (case.inputs, case.targets)
    size = _size(case.model)
    first, second = torch.randn(2, size, dtype=torch.float64)
    shapes = [p.shape for p in case.model.parameters()]
    lists = [
        [part.view(shape) for part, shape in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
        for v in (first, second)
    ]

    def losses(directions: Any) -> Tensor:
        return landscape(case.model, case.loss_fn, data, directions, points=3).losses["loss"]

    for same in (first[:, None], lists[0], [first], [lists[0]], tuple(lists[0])):
        assert torch.equal(losses(same), losses(first))
    for same in ([first, second], lists, (lists[0], second)):
        assert torch.equal(losses(same), losses(torch.stack([first, second], dim=1)))
    # A part of the parameters: the others stay.
    chosen = landscape(case.model, case.loss_fn, data, lists[0][2:], params=["2"], points=3).losses["loss"]
    padded = torch.cat([torch.zeros_like(p).view(-1) for p in lists[0][:2]] + [p.reshape(-1) for p in lists[0][2:]])
    assert torch.equal(chosen, losses(padded))


def test_loader_and_sum() -> None:
    case = make_case("mlp")
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=4)
    direction = torch.randn(_size(case.model), dtype=torch.float64)
    one = landscape(case.model, case.loss_fn, (case.inputs, case.targets), direction, points=3)
    many = landscape(case.model, case.loss_fn, loader, direction, points=3)
    torch.testing.assert_close(one.losses["loss"], many.losses["loss"], rtol=1e-12, atol=0)
    summed = landscape(
        case.model, nn.CrossEntropyLoss(reduction="sum"), loader, direction, points=3, reduction="sum"
    ).losses["loss"]
    torch.testing.assert_close(summed, 11 * one.losses["loss"], rtol=1e-12, atol=0)


def test_a_loss_without_derivative() -> None:
    case = make_case("mlp")
    direction = torch.randn(_size(case.model), dtype=torch.float64)

    def error_rate(output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) != targets).double().mean()

    result = landscape(case.model, error_rate, (case.inputs, case.targets), direction, points=5)
    for a, value in zip(result.coordinates[0].tolist(), result.losses["loss"].tolist(), strict=True):
        wrong = _direct(Case("", case.model, error_rate, case.inputs, case.targets), direction[None], (a,), *data(case))
        assert value == wrong


def data(case: Case) -> tuple[Tensor, Tensor]:
    return case.inputs, case.targets


def test_float32_and_half_precision_models() -> None:
    case = make_case("mlp", torch.float32)
    direction = torch.randn(_size(case.model), dtype=torch.float64)  # as from a copy in float64
    result = landscape(case.model, case.loss_fn, data(case), direction, points=5)
    for a, value in zip(result.coordinates[0].tolist(), result.losses["loss"].tolist(), strict=True):
        assert value == pytest.approx(_direct(case, direction.float()[None], (a,), *data(case)), rel=1e-5)
    # A half-precision model runs in float32 on displacements that its own type would round away.
    half = make_case("mlp", torch.bfloat16)
    wide = half.to(torch.float32)
    fine: dict[str, Any] = {"points": 3, "radius": 1e-4}
    half = make_case("mlp", torch.bfloat16)
    coarse = landscape(half.model, half.loss_fn, (half.inputs, half.targets), direction.float(), **fine)
    same = landscape(wide.model, wide.loss_fn, (wide.inputs, wide.targets), direction.float(), **fine)
    assert torch.equal(coarse.losses["loss"], same.losses["loss"])
    assert len(set(coarse.losses["loss"].tolist())) == 3


class _Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.scale > -0.5, torch.exp(60 * self.scale) * x, x * float("nan"))


def test_losses_that_overflow_are_kept_and_drawn_as_gaps() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    model, batch = _Overflowing(), (torch.ones(2, 1), torch.zeros(2, 1))
    result = landscape(model, functional.mse_loss, batch, torch.ones(1), radius=1.5, points=7)
    losses = result.losses["loss"]
    assert losses.isnan().tolist() == [True] * 2 + [False] * 5  # the scale is -1.0 and -0.5 in the first two
    assert losses.isposinf().tolist() == [False] * 4 + [True] * 3
    assert result.evaluated.all()
    for log in (False, True):
        axes = result.plot(log=log)
        drawn = np.asarray(axes.lines[0].get_ydata(), dtype=float)
        assert np.isfinite(drawn).tolist() == torch.isfinite(losses).tolist()
        axes.figure.canvas.draw()
    pyplot.close("all")


@pytest.mark.parametrize("log", [False, True])
def test_plots(log: bool) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    case = make_case("mlp")
    sets = {"train": (case.inputs[:6], case.targets[:6]), "test": (case.inputs[6:], case.targets[6:])}
    rows = torch.randn(2, _size(case.model), dtype=torch.float64)
    line = landscape(case.model, case.loss_fn, sets, rows[0], points=5, curvature=True)
    axes = line.plot(log=log)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "test"]
    assert len(axes.lines) == 2 * 2 + 1  # with the dashed parabolas and the mark of the centre
    assert len(line.plot(dataset="test", log=log).lines) == 3
    plane = landscape(case.model, case.loss_fn, sets, rows.mT, points=3, labels=["v₁", "v₂"])
    _, given = pyplot.subplots()
    assert plane.plot(given, log=log, dataset="test") is given
    assert (given.get_xlabel(), given.get_ylabel()) == ("v₁", "v₂")
    for one in (axes, given):
        one.figure.canvas.draw()
        assert np.isfinite(one.get_xlim() + one.get_ylim()).all()
    with pytest.raises(ValueError, match="dataset: expected one of 'train', 'test', got 'x'"):
        plane.plot(dataset="x")
    pyplot.close("all")


def test_a_plot_that_cannot_be() -> None:
    pytest.importorskip("matplotlib")
    model = nn.Linear(1, 1)

    def signed(output: Tensor, targets: Tensor) -> Tensor:
        return output.sum()

    result = landscape(model, signed, (torch.ones(1, 1), torch.ones(1)), torch.ones(2), radius=50.0, points=3)
    with pytest.raises(ValueError, match=r"plot: log: the loss is -.* no logarithm; use log=False"):
        result.plot(log=True)


def _resumed_equals_whole(make: Callable[..., Any], path: Path, stops_after: int) -> None:
    whole = make()

    def fail(done: int, total: int | None) -> None:
        if done == stops_after:
            raise RuntimeError("the machine goes down")

    with pytest.raises(RuntimeError, match="goes down"):
        make(checkpoint=path, progress=fail)
    saved = json.loads(path.read_text())
    assert len(saved["done"]) == stops_after + 1  # and the centre
    resumed = make(checkpoint=path)
    again = make(checkpoint=path)
    for result in (resumed, again):
        for name in whole.losses:
            assert torch.equal(
                result.losses[name].view(torch.int64), whole.losses[name].view(torch.int64)
            )  # also NaN, bit for bit
        assert result.centre == whole.centre
        assert not result.interrupted
    assert again.evaluations == len(whole.losses)
    assert resumed.evaluations < whole.evaluations


@pytest.mark.parametrize("form", ["batch", "loader"])
def test_resumed_bit_for_bit(form: str, tmp_path: Path) -> None:
    case = make_case("batchnorm", torch.float32)
    dataset = TensorDataset(case.inputs, case.targets)
    one: Any = data(case) if form == "batch" else DataLoader(dataset, batch_size=3)
    sets = {"train": one, "test": (case.inputs[:2] * 2, case.targets[:2])}
    directions = random_directions(case.model, 2)

    def make(**options: Any) -> Any:
        with unchanged(case.model):
            return landscape(case.model, case.loss_fn, sets, directions, points=5, **options)

    _resumed_equals_whole(make, tmp_path / "plane.json", 7)


def test_resumed_with_infinite_losses(tmp_path: Path) -> None:
    model, batch = _Overflowing(), (torch.ones(2, 1), torch.zeros(2, 1))

    def make(**options: Any) -> Any:
        return landscape(model, functional.mse_loss, batch, torch.ones(1), radius=1.5, points=7, **options)

    _resumed_equals_whole(make, tmp_path / "line.json", 6)


def test_interrupted_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("mlp")
    direction = torch.randn(_size(case.model), dtype=torch.float64)
    path = tmp_path / "line.json"
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(_resume, "_SECONDS", 0.0)

    def interrupt(done: int, total: int | None) -> None:
        assert len(json.loads(path.read_text())["done"]) == done + 1  # written as it goes
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    def make(**options: Any) -> Any:
        with unchanged(case.model):
            return landscape(case.model, case.loss_fn, data(case), direction, points=9, **options)

    try:
        part = make(checkpoint=path, progress=interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(progress=lambda done, total: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    finally:
        signal.signal(signal.SIGINT, found)
    assert part.interrupted
    # From the centre outwards.
    assert part.evaluated.tolist() == [False] * 2 + [True] * 4 + [False] * 3
    assert part.losses["loss"].isnan().tolist() == (~part.evaluated).tolist()
    whole = make()
    assert torch.equal(part.losses["loss"][part.evaluated], whole.losses["loss"][part.evaluated])
    assert torch.equal(make(checkpoint=path).losses["loss"], whole.losses["loss"])


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    case = make_case("batchnorm")
    direction = torch.randn(_size(case.model), dtype=torch.float64)
    path = tmp_path / "line.json"

    def run(model: nn.Module = case.model, loss_fn: Any = case.loss_fn, **changed: Any) -> Any:
        options = {"data": data(case), "directions": direction, "points": 3, "checkpoint": path, **changed}
        return landscape(model, loss_fn, **options)

    run()
    before = path.read_bytes()
    buffer_changed = make_case("batchnorm").model
    buffer_changed[1].running_mean[0] += 1  # type: ignore[index,union-attr,operator]
    other = direction.clone()
    other[3] += 1e-12
    inputs = case.inputs.clone()
    inputs[0, 0, 0, 0] += 1e-12
    for changes, match in [
        ({"model": buffer_changed}, "the model"),
        ({"directions": other}, "the directions"),
        ({"radius": 2.0}, "the grid"),
        ({"points": 5}, "the grid"),
        ({"data": (inputs, case.targets)}, "the data"),
        ({"data": {"train": data(case)}}, "the data"),
        ({"data": [(case.inputs[:3], case.targets[:3]), (case.inputs[3:], case.targets[3:])]}, "the data"),
        ({"reduction": "sum"}, "reduction"),
        ({"loss_fn": lambda o, t: 1.5 * case.loss_fn(o, t)}, r"the loss at the centre \(loss\) was"),
    ]:
        with pytest.raises(ValueError, match="landscape: checkpoint: .*line.json is of another analysis: " + match):
            run(**changes)
        assert path.read_bytes() == before
    for content, match in [
        ("{", "is not a checkpoint of it, or damaged"),
        ("[]", "is not a checkpoint of it"),
        (json.dumps({"kind": "kronfac landscape", "version": 9}), "has version 9, expected 1"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=match):
            run()
        assert path.read_text() == content
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        run(checkpoint=tmp_path / "no" / "line.json")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        run(checkpoint=tmp_path)
    with pytest.raises(TypeError, match="checkpoint: expected a path or None, got int"):
        run(checkpoint=3)


def test_refusals() -> None:
    case = make_case("mlp")
    size = _size(case.model)
    ones = torch.ones(size, dtype=torch.float64)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"directions": torch.ones(3)}, ValueError, f"directions: expected n = {size} entries"),
        ({"directions": torch.ones(size, 3)}, ValueError, r"directions: expected one or two directions, got 3; choose"),
        ({"directions": []}, ValueError, "directions: expected one or two directions, got 0"),
        ({"directions": "v"}, TypeError, "directions: expected a vector"),
        ({"directions": [[torch.ones(2)]]}, ValueError, "directions: expected tensors of the parameters' shapes"),
        ({"directions": [3.0]}, TypeError, "directions: expected a vector or a list of tensors"),
        ({"directions": torch.ones(size, dtype=torch.int64)}, TypeError, "directions: expected a real floating-point"),
        ({"directions": 0 * ones}, ValueError, "directions: a direction is zero"),
        ({"directions": float("nan") * ones}, ValueError, "directions: a direction contains NaN"),
        ({"directions": [ones, -2 * ones]}, ValueError, "directions: the two are parallel"),
        ({"radius": 0.0}, ValueError, "radius: expected a finite number greater than 0"),
        ({"radius": (1.0, 1.0)}, ValueError, "radius: expected one number, or one for each of 1 directions"),
        ({"points": 1}, ValueError, "points: expected at least 2"),
        ({"grid": [0.0, 0.0]}, ValueError, "grid: expected at least two finite, strictly ascending"),
        ({"grid": ["a", "b"]}, TypeError, "grid: expected numbers"),
        ({"grid": [0.0, 1.0], "points": 3}, ValueError, "grid: give either"),
        ({"labels": ["a", "b"]}, ValueError, "labels: expected 1 strings"),
        ({"reduction": "none"}, ValueError, "reduction: expected"),
        ({"params": ["x"]}, ValueError, "params: the model has no parameter"),
        ({"data": {}}, ValueError, "data: expected data sets by name"),
        ({"data": {"a": [1]}}, TypeError, "data: batch 0: expected a pair"),
        ({"data": DataLoader(TensorDataset(*data(case)), shuffle=True)}, ValueError, "data: the DataLoader shuffles"),
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a callable"),
        ({"loss_fn": lambda o, t: o}, ValueError, "loss_fn: expected a scalar tensor"),
        ({"loss_fn": lambda o, t: torch.rand(()) + o.sum()}, ValueError, "random numbers were drawn"),
        ({"loss_fn": lambda o, t: o.sum() * math.nan}, ValueError, "loss_fn: the loss is nan"),
    ]
    for changed, error, match in cases:
        options = {"model": case.model, "loss_fn": case.loss_fn, "data": data(case), "directions": ones, **changed}
        with unchanged(case.model), pytest.raises(error, match="kronfac.spectrum.landscape: .*" + match):
            landscape(**options)
    bad = [data(case), (case.inputs * math.inf, case.targets)]  # the second batch only
    with pytest.raises(ValueError, match="data: the loss at the model's own parameters is nan"):
        landscape(case.model, case.loss_fn, bad, ones)


def test_parameters_that_would_stay_where_they_are() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.kept = [self.linear.weight]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kept[0]

    with pytest.raises(ValueError, match="landscape: model, loss_fn: parameters are used through references"):
        landscape(Sneaky(), functional.mse_loss, (torch.ones(1, 2), torch.ones(1, 2)), torch.ones(6))


def test_kfac_does_not_notice() -> None:
    factors = []
    for analysed in (True, False):
        case = make_case("mlp", torch.float32)
        optimizer = kronfac.KFAC(case.model, lr=0.1, inverse_every=1, seed=0)
        with optimizer.record_statistics():  # which would take those of any forward
            case.loss_fn(case.model(case.inputs), case.targets).backward()
            if analysed:
                direction = random_directions(case.model, 1)
                with unchanged(case.model):
                    landscape(case.model, case.loss_fn, data(case), direction, points=3, curvature=True)
        optimizer.step()
        factors.append(optimizer.factors())
    for name, pair in factors[0].items():
        assert torch.equal(pair.A, factors[1][name].A)
        assert torch.equal(pair.G, factors[1][name].G)
