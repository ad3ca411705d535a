"""The density of every block, against dense blocks and the density of each block alone."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
import torch

from kronfac.operators import hessian
from kronfac.spectrum import DensityResult, LogDensityResult, block_densities, density
from tests.operators.cases import dense_hessian, make_case
from tests.operators.state import unchanged


def _operator(name: str = "mlp") -> Any:
    case = make_case(name)
    return hessian(case.model, case.loss_fn, (case.inputs, case.targets))


@pytest.mark.parametrize("axis", ["linear", "log"])
def test_each_is_the_density_of_its_block(axis: Any) -> None:
    case = make_case("batchnorm")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    calls: list[tuple[int, int | None]] = []
    with unchanged(case.model):
        result = block_densities(
            operator, probes=3, steps=9, axis=axis, checks=2, seed=4, progress=lambda d, t: calls.append((d, t))
        )
    assert list(result) == list(operator.blocks())
    assert len(result) == 3
    # 6 parameters only in the second block, and a Krylov space may end earlier.
    assert calls[-1] == (result.products, (9 + 6 + 9) * 3 + 3 * 2)
    assert result.products == sum(found.products for found in result.values())
    assert not result.interrupted
    for name, block in operator.blocks().items():
        alone = density(block, probes=3, steps=9, axis=axis, checks=2, seed=4)
        found = result[name]
        assert type(found) is type(alone)
        ours, own = (r.linear if isinstance(r, LogDensityResult) else r for r in (found, alone))
        assert torch.equal(ours.values, own.values)
        assert ours.checks == own.checks


def test_against_dense_blocks() -> None:
    case = make_case("mlp")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    groups = {"ends": ["0.weight", "2.bias"], "last": ["2"]}
    result = block_densities(operator, groups, probes=150, steps=100)
    for name, names in {"ends": ["0.weight", "2.bias"], "last": ["2.weight", "2.bias"]}.items():
        matrix = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets, names)
        values = torch.linalg.eigvalsh(matrix).numpy()
        found = result[name]
        assert isinstance(found, DensityResult)
        grid, phi = found.grid.numpy(), found.values.numpy()
        steps = np.diff(grid)
        cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (phi[1:] + phi[:-1]) * steps)])
        gap = np.abs(cumulative - np.searchsorted(values, grid, side="right") / len(values))
        distance = float((0.5 * (gap[1:] + gap[:-1]) * steps).sum())
        assert distance <= 0.02 * float(values[-1] - values[0])
        assert abs(found.trace - values.sum()) < 4 * found.trace_stderr
        assert abs(found.squared_frobenius - (values**2).sum()) < 4 * found.squared_frobenius_stderr


def test_interrupted_with_the_blocks_that_were_reached() -> None:
    operator = _operator("batchnorm")
    found = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(done: int, total: int | None) -> None:
        if done == 2 * 6 + 2 * 3:
            signal.raise_signal(signal.SIGINT)

    try:
        result = block_densities(operator, probes=2, steps=6, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, found)
    assert result.interrupted
    names = list(operator.blocks())
    assert list(result) == names[:2]
    assert [result[name].interrupted for name in result] == [False, True]
    assert result.products == 18
    assert result[names[1]].products == 6


@pytest.mark.parametrize("axis", ["linear", "log"])
def test_plot(axis: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = block_densities(_operator(), probes=2, steps=8, axis=axis)
    _, given = pyplot.subplots()
    for axes in (result.plot(), result.plot(given)):
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "2"]
        assert axes.get_xscale() == axis
        axes.figure.canvas.draw()
    pyplot.close("all")


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"kronfac.spectrum.block_densities: op: expected an operator of kronfac"):
        block_densities(torch.eye(3))  # type: ignore[arg-type]
    operator = _operator()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"probes": 1}, ValueError, "kronfac.spectrum.block_densities: probes: expected at least 2"),
        ({"steps": "8"}, TypeError, "kronfac.spectrum.block_densities: steps: expected an integer"),
        ({"axis": 3}, ValueError, "kronfac.spectrum.block_densities: axis: expected one of"),
        ({"groups": {"a": ["nothing"]}}, ValueError, "names none of the operator's parameters"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            block_densities(operator, **options)
