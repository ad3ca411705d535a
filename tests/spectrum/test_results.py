from __future__ import annotations

import builtins
import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
import torch

from kronfac.spectrum import DensityResult, EigenResult, TraceResult, density, eigsh, trace
from tests.linalg.matrices import with_spectrum

MATRIX = with_spectrum(np.concatenate([[50.0, 20.0, -4.0], np.random.default_rng(0).exponential(0.5, 97)]))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return {"eigsh": eigsh(MATRIX, 5), "trace": trace(MATRIX, probes=20), "density": density(MATRIX, steps=30)}


@pytest.mark.parametrize("name", ["eigsh", "trace", "density"])
def test_results_are_frozen(results: dict[str, Any], name: str) -> None:
    result = results[name]
    assert dataclasses.is_dataclass(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.products = 0
    assert (result == result) is True  # by identity; comparing tensors would raise


@pytest.fixture
def pyplot() -> Any:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.parametrize("name", ["eigsh", "trace", "density"])
def test_plots_have_labels_and_draw(results: dict[str, Any], name: str, pyplot: Any) -> None:
    _, given = pyplot.subplots()
    assert results[name].plot(given) is given
    fresh = results[name].plot()
    assert fresh is not given
    for axes in (given, fresh):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        axes.figure.canvas.draw()
        low, high = axes.get_ylim()
        assert np.isfinite([low, high]).all()
        assert low < high


def test_density_plot_shows_single_eigenvalues(results: dict[str, Any], pyplot: Any) -> None:
    result: DensityResult = results["density"]
    axes = result.plot()
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low > 0
    assert low < float(result.values[torch.argmin((result.grid - 50.0).abs())]) < high
    assert float(result.values.max()) < high
    assert high / low < 1e12


def test_eigenvalue_plot_tells_what_has_not_converged(pyplot: Any) -> None:
    result = EigenResult(
        values=torch.tensor([3.0, 2.0]),
        vectors=torch.eye(2),
        residuals=torch.tensor([0.0, 0.5]),
        converged=torch.tensor([True, False]),
        products=4,
    )
    labels = [text.get_text() for text in result.plot().get_legend().get_texts()]
    assert labels == ["converged", "not converged"]


def test_trace_plot_ends_at_the_estimate(pyplot: Any) -> None:
    result: TraceResult = trace(MATRIX, probes=20)
    (line,) = result.plot().get_lines()
    assert float(line.get_ydata()[-1]) == pytest.approx(result.value)


@pytest.mark.parametrize("name", ["eigsh", "trace", "density"])
def test_without_matplotlib(results: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == "matplotlib":
            raise ImportError(module)
        return real(module, *args, **kwargs)

    for module in [module for module in sys.modules if module.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install kronfac\[plot\]"):
        results[name].plot()
