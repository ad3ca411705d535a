"""Eigenvalues and gradient norm at the checkpoints of a training run."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac.cli.checkpoint import save_checkpoint
from kronfac.spectrum import through_training
from tests.operators.cases import Case, dense_ggn, dense_hessian, make_case
from tests.operators.state import unchanged


def _trained(
    name: str = "mlp", count: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Case, list[dict[str, Any]]]:
    """A case and the state dicts of a few steps of its training, which go on after the last of them."""
    case = make_case(name, dtype)
    twin = copy.deepcopy(case.model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
    states = []
    for _ in range(count):
        states.append(copy.deepcopy(twin.state_dict()))
        for _ in range(5):
            optimizer.zero_grad()
            case.loss_fn(twin(case.inputs), case.targets).backward()
            optimizer.step()
    return case, states


def _gradient_norm(case: Case, model: nn.Module) -> tuple[float, float]:
    model.eval()
    loss = case.loss_fn(model(case.inputs), case.targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), math.sqrt(sum(float(g.square().sum()) for g in gradients))


@pytest.mark.parametrize("name", ["mlp", "batchnorm"])
@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_against_dense_matrices(name: str, operator: str) -> None:
    case, states = _trained(name)
    calls: list[tuple[int, int | None]] = []
    with unchanged(case.model):
        result = through_training(
            case.model,
            states,
            case.loss_fn,
            (case.inputs, case.targets),
            k=3,
            operator=operator,
            tol=1e-9,
            trace_probes=40,
            progress=lambda d, t: calls.append((d, t)),
        )
    assert calls == [(done, 4) for done in range(1, 5)]
    assert result.converged.all()
    assert not result.interrupted
    assert result.traces is not None
    assert result.trace_stderrs is not None
    dense = {"hessian": dense_hessian, "ggn": dense_ggn}[operator]
    for index, state in enumerate(states):
        model = make_case(name).model
        model.load_state_dict(state)
        values = torch.linalg.eigvalsh(dense(model, case.loss_fn, case.inputs, case.targets))
        top = values[values.abs().argsort(descending=True)][:3]
        torch.testing.assert_close(result.values[index], top, rtol=1e-8, atol=0)
        loss, length = _gradient_norm(case, model)
        assert float(result.losses[index]) == pytest.approx(loss, rel=1e-12)
        assert float(result.gradient_norms[index]) == pytest.approx(length, rel=1e-10)
        assert abs(float(result.traces[index] - values.sum())) < 5 * float(result.trace_stderrs[index])
    assert result.losses[0] > result.losses[-1]
    assert (result.unit, result.steps.tolist()) == ("checkpoint", [0, 1, 2, 3])
    assert result.names == ("checkpoint 0", "checkpoint 1", "checkpoint 2", "checkpoint 3")


def test_forms_of_checkpoints(tmp_path: Path) -> None:
    case, states = _trained(count=3)
    data = (case.inputs, case.targets)

    def run(checkpoints: Any, model: nn.Module = case.model) -> Any:
        return through_training(model, checkpoints, case.loss_fn, data, params=["2"])

    expected = run(states)
    files = []
    for number, state in enumerate(states):
        files.append(tmp_path / f"state{number}.pt")
        torch.save(state, files[-1])
    contents = [
        ({"state_dict": {f"module.{name}": value for name, value in state.items()}, "global_step": 10 * number})
        for number, state in enumerate(states)
    ]
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"wrapped{number}.pt")
        save_checkpoint(
            tmp_path / f"train{number}.pt",
            {"config": {}, "epoch": 2 * number, "model": states[number], "optimizer": {}, "history": {}, "random": {}},
        )
    for checkpoints, unit, steps in [
        (files, "checkpoint", [0, 1, 2]),
        ([str(file) for file in files], "checkpoint", [0, 1, 2]),
        (contents, "step", [0, 10, 20]),
        ([tmp_path / f"wrapped{number}.pt" for number in range(3)], "step", [0, 10, 20]),
        ([tmp_path / f"train{number}.pt" for number in range(3)], "epoch", [0, 2, 4]),
        (dict(zip((1, 5, 8.5), files, strict=True)), "step", [1, 5, 8.5]),
        ([files[0], contents[1], tmp_path / "train2.pt"], "checkpoint", [0, 1, 2]),
    ]:
        result = run(checkpoints)
        assert (result.unit, result.steps.tolist()) == (unit, steps)
        assert torch.equal(result.values, expected.values)
        assert torch.equal(result.losses, expected.losses)
    rows = expected.rows()
    assert json.loads(json.dumps(rows))[1]["gradient_norm"] == float(expected.gradient_norms[1])
    assert rows[2]["position"] == 2.0
    assert "trace" not in rows[0]
    # The parameters given as the model's own tensors.
    own = through_training(case.model, states, case.loss_fn, data, params=list(case.model[2].parameters()))  # type: ignore[index,union-attr,arg-type,operator]
    assert torch.equal(own.values, expected.values)


def test_single_precision_checkpoints_in_a_double_model() -> None:
    case, states = _trained(dtype=torch.float32, count=2)
    double = case.to(torch.float64)
    result = through_training(double.model, states, double.loss_fn, (double.inputs, double.targets), tol=1e-9)
    model = make_case("mlp").model
    model.load_state_dict(states[1])
    values = torch.linalg.eigvalsh(dense_hessian(model, double.loss_fn, double.inputs, double.targets))
    assert float(result.values[1, 0]) == pytest.approx(float(values.abs().max()), rel=1e-8)


def test_a_run_that_diverged() -> None:
    case, states = _trained(count=3)
    states[1] = {name: torch.full_like(value, math.nan) for name, value in states[1].items()}
    result = through_training(case.model, states, case.loss_fn, (case.inputs, case.targets), k=2, trace_probes=4)
    assert result.traces is not None
    assert result.losses.isnan().tolist() == [False, True, False]
    assert result.gradient_norms.isnan().tolist() == [False, True, False]
    assert result.values.isnan().all(1).tolist() == [False, True, False]
    assert result.traces.isnan().tolist() == [False, True, False]
    assert result.converged.all(1).tolist() == [True, False, True]


@pytest.fixture
def signals() -> Iterator[None]:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


def _same(one: Any, other: Any) -> None:
    for name in ("steps", "losses", "gradient_norms", "values", "residuals", "converged", "traces", "trace_stderrs"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)
    assert one.names == other.names
    assert one.products == other.products


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("where", ["between", "within"])
def test_interrupted_and_taken_up(where: str, tmp_path: Path) -> None:
    case, states = _trained("batchnorm", count=4)
    states[1] = {name: value * math.inf if value.is_floating_point() else value for name, value in states[1].items()}
    path = tmp_path / "table.json"
    evaluations = 0

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if signals and signals[0] == evaluations:
            signals.pop()
            signal.raise_signal(signal.SIGINT)
        return functional.cross_entropy(output, targets)

    def run(**options: Any) -> Any:
        with unchanged(case.model):
            return through_training(
                case.model, states, loss_fn, (case.inputs, case.targets), k=2, trace_probes=6, **options
            )

    signals: list[int] = []
    whole = run()
    spent, evaluations = evaluations, 0

    def interrupt(done: int, total: int | None) -> None:
        if done == 2 and where == "between":
            signal.raise_signal(signal.SIGINT)

    if where == "within":
        signals.append(spent - 1)  # at the last checkpoint
    part = run(checkpoint=path, progress=interrupt)
    reached = 2 if where == "between" else 3
    assert part.interrupted
    assert part.names == whole.names[:reached]
    torch.testing.assert_close(part.values, whole.values[:reached], rtol=0, atol=0, equal_nan=True)
    resumed = run(checkpoint=path)
    assert not resumed.interrupted
    _same(resumed, whole)
    before = evaluations
    _same(run(checkpoint=path), whole)
    assert evaluations - before < spent / 2
    # Training went on: only the new checkpoint is computed.
    states.insert(2, {name: value + 1 for name, value in states[0].items()})
    longer = run(checkpoint=path)
    assert torch.equal(longer.losses[[0, 3, 4]], whole.losses[[0, 2, 3]])
    _same(longer, run())


@pytest.mark.usefixtures("signals")
def test_interrupted_before_anything_is_done() -> None:
    case, states = _trained(count=2)

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        if not torch.equal(output, first):
            signal.raise_signal(signal.SIGINT)
        return functional.cross_entropy(output, targets)

    with torch.no_grad():
        first = case.model(case.inputs)
    with pytest.raises(KeyboardInterrupt):
        through_training(case.model, states[1:], loss_fn, (case.inputs, case.targets))


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    case, states = _trained(count=2)
    path = tmp_path / "table.json"

    def run(loss_fn: Any = case.loss_fn, data: Any = (case.inputs, case.targets), **options: Any) -> Any:
        return through_training(case.model, states, loss_fn, data, checkpoint=path, **options)

    run()
    for options, match in [
        ({"k": 2}, "k differs"),
        ({"tol": 1e-4}, "tol differs"),
        ({"operator": "ggn"}, "the operator differs"),
        ({"params": ["0"]}, "the chosen parameters differs"),
        ({"data": (case.inputs + 1e-9, case.targets)}, "the data differs"),
        ({"loss_fn": lambda o, t: 2 * case.loss_fn(o, t)}, "the loss of checkpoint 0 was"),
    ]:
        with pytest.raises(ValueError, match=f"through_training: checkpoint: .* is of another analysis: {match}"):
            run(**options)


def test_refusals(tmp_path: Path) -> None:
    case, states = _trained(count=2)
    damaged = tmp_path / "damaged.pt"
    torch.save(states[0], damaged)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    whole = tmp_path / "model.pt"
    torch.save(case.model, whole)
    lacking = {name: value for name, value in states[0].items() if name != "2.bias"}
    wide = {**states[0], "2.bias": torch.zeros(4)}
    further = {**states[0], "3.bias": torch.zeros(4)}
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([], {}, ValueError, "checkpoints: expected at least one"),
        (states[0], {}, ValueError, "checkpoints: expected a list of state dicts, got one"),
        ("a.pt", {}, TypeError, "checkpoints: expected a list of files"),
        (["a.pt"], {}, FileNotFoundError, "checkpoints: a.pt: no such file"),
        ([3], {}, TypeError, "checkpoints: number 0: expected a path or a state dict, got int"),
        ({"a": states[0]}, {}, TypeError, "checkpoints: expected steps as keys"),
        ([damaged], {}, ValueError, "checkpoints: .*damaged"),
        ([text], {}, ValueError, "checkpoints: .*text.pt: "),
        ([whole], {}, ValueError, "checkpoints: .*model.pt: no checkpoint, or one that holds more than tensors"),
        ([{"weights": states[0]}], {}, ValueError, "checkpoint 0: expected a state dict, alone or as one of 'model'"),
        ([lacking], {}, ValueError, "checkpoint 0: does not fit the model, '2.bias' is only in the model"),
        ([further], {}, ValueError, "checkpoint 0: does not fit the model, '3.bias' is only in the checkpoint"),
        ([wide], {}, ValueError, r"'2.bias' has the shape \(4,\), expected \(3,\)"),
        (states, {"k": 0}, ValueError, "k: expected at least 1"),
        (states, {"operator": "fisher"}, ValueError, "operator: expected one of 'hessian', 'ggn'"),
        (states, {"which": "top"}, ValueError, "which: expected one of"),
        (states, {"trace_probes": 1}, ValueError, "trace_probes: expected 0 or at least 2"),
        (states, {"params": ["x"]}, ValueError, "params: the model has no parameter"),
        (states, {"progress": 3}, TypeError, "progress: expected a function"),
    ]
    for checkpoints, options, error, match in cases:
        with unchanged(case.model), pytest.raises(error, match="kronfac.spectrum.through_training: .*" + match):
            through_training(case.model, checkpoints, case.loss_fn, (case.inputs, case.targets), **options)

    class Lonely(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("only one of me")

    with pytest.raises(TypeError, match=r"model: cannot be copied \(only one of me\)"):
        through_training(Lonely(2, 2), states, functional.mse_loss, (torch.ones(1, 2), torch.ones(1, 2)))


def test_a_model_that_kfac_trains() -> None:
    case, _ = _trained(dtype=torch.float32)
    optimizer = kronfac.KFAC(case.model, lr=0.1, inverse_every=1, seed=0)
    states = {}
    for step in range(3):
        optimizer.zero_grad()
        case.loss_fn(case.model(case.inputs), case.targets).backward()
        optimizer.step()
        states[step] = copy.deepcopy(case.model.state_dict())
        with unchanged(case.model):
            result = through_training(case.model, states, case.loss_fn, (case.inputs, case.targets))
    assert len(set(result.values[:, 0].tolist())) == 3


@pytest.mark.parametrize("log", [False, True])
def test_plot(log: bool) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    case, states = _trained(count=3)
    states[1] = {name: torch.full_like(value, math.nan) for name, value in states[1].items()}
    result = through_training(case.model, states, case.loss_fn, (case.inputs, case.targets), k=3, which="both")
    _, given = pyplot.subplots()
    assert result.plot(given, log=log) is given
    given.figure.canvas.draw()
    assert given.get_xlabel() == "checkpoint"
    assert given.get_yscale() == ("log" if log else "linear")
    assert np.isfinite(given.get_ylim()).all()
    assert len(given.figure.axes) == 2
    pyplot.close("all")
