from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Kronfac
from tests.cli.problems_for_tests import regression_data
from tests.datasets.files import write_mnist

HERE = "tests.cli.problems_for_tests"
PNG = b"\x89PNG\r\n\x1a\n"


def regression_hessian() -> torch.Tensor:
    """Of the mean of (w·x + b - y)²: (2/N) Σ [x 1][x 1]ᵀ, whatever the parameters."""
    x = torch.cat([regression_data()[0], torch.ones(24, 1)], dim=1).double()
    return 2 / 24 * x.T @ x


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("double", [[], ["--double"]])
def test_least_squares(kronfac: Kronfac, operator: str, double: list[str]) -> None:
    options = ["--operator", operator, "--top", 6, "--trace-probes", 400, "--no-density", *double]
    outcome = kronfac("spectrum", f"{HERE}:regression", *options, "--json", "--quiet")
    assert outcome.status == 0
    result = outcome.json
    expected = torch.linalg.eigvalsh(regression_hessian()).flip(0)
    tolerance = 1e-9 if double else 1e-5
    assert torch.allclose(torch.tensor(result["top_eigenvalues"], dtype=torch.float64), expected, rtol=tolerance)
    assert max(result["relative_residuals"]) <= 1e-4
    assert result["converged"] == [True] * 6
    assert abs(result["trace"] - float(expected.sum())) <= 5 * result["trace_stderr"]
    assert 0 < result["trace_stderr"] < 0.1 * result["trace"]
    assert (result["parameters"], result["examples"], result["density"]) == (6, 24, None)


def test_examples_limits_the_data(kronfac: Kronfac) -> None:
    # Ten examples: the first batch of seven whole and three of the next.
    outcome = kronfac("spectrum", f"{HERE}:regression", "--top", 1, "--examples", 10, "--no-density", "--json")
    assert outcome.status == 0
    assert outcome.json["examples"] == 10
    x = torch.cat([regression_data()[0][:10], torch.ones(10, 1)], dim=1).double()
    expected = torch.linalg.eigvalsh(2 / 10 * x.T @ x)[-1]
    assert abs(outcome.json["top_eigenvalues"][0] - expected) < 1e-4 * expected


def test_of_a_trained_network(kronfac: Kronfac, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "spectrum"
    assert kronfac("train", "--optimizer", "sgd", "--lr", 0.2, "--epochs", 2, "--out", run, "--quiet").status == 0
    options = ["--top", 3, "--trace-probes", 4, "--density-probes", 2, "--density-steps", 10, "--examples", 200]
    outcome = kronfac("spectrum", "--checkpoint", run / "checkpoint.pt", *options, "--out", out, "--json")
    assert outcome.status == 0
    assert "eigenvalues" in outcome.err  # the progress bars
    assert "density" in outcome.err
    result = json.loads((out / "spectrum.json").read_text())
    assert result == outcome.json
    assert result["problem"] == "digits"
    assert sorted(path.name for path in out.iterdir()) == [
        "density.png",
        "eigenvalues.png",
        "spectrum.json",
        "trace.png",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    density = result["density"]
    width = density["grid"][1] - density["grid"][0]
    assert abs(sum(density["values"]) * width - 1) < 1e-3

    bare = tmp_path / "bare.pt"
    torch.save(torch.load(run / "checkpoint.pt", weights_only=True)["model"], bare)
    again = kronfac("spectrum", "digits", "--checkpoint", bare, *options, "--json", "--quiet").json
    assert again["top_eigenvalues"] == result["top_eigenvalues"]
    fresh = kronfac("spectrum", "digits", *options, "--json", "--quiet").json
    assert fresh["top_eigenvalues"] != result["top_eigenvalues"]


def test_shuffled_loader_and_dropout(kronfac: Kronfac) -> None:
    # The data are read once and the model is in evaluation mode: one fixed function, so products agree with each other.
    options = ["--top", 4, "--trace-probes", 0, "--no-density", "--double", "--json", "--quiet"]
    first = kronfac("spectrum", f"{HERE}:classifier", *options)
    second = kronfac("spectrum", f"{HERE}:classifier", *options)
    assert first.status == second.status == 0
    assert first.json["top_eigenvalues"] == pytest.approx(second.json["top_eigenvalues"], rel=1e-9)
    assert first.json["examples"] == 90


def test_mnist_from_files(kronfac: Kronfac, tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    options = ["--data-dir", tmp_path, "--top", 1, "--trace-probes", 0, "--no-density", "--quiet"]
    outcome = kronfac("spectrum", "mnist", *options)
    assert outcome.status == 0
    assert "21,310 parameters, 40 examples" in outcome.out


@pytest.mark.parametrize("content", ["other problem", "other network", "text"])
def test_checkpoint_that_does_not_fit(kronfac: Kronfac, tmp_path: Path, content: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if content == "other problem":
        assert kronfac("train", f"{HERE}:classifier", "--epochs", 1, "--out", tmp_path, "--quiet").status == 0
        message = "was trained on tests.cli.problems_for_tests:classifier, not on digits"
    elif content == "other network":
        torch.save({"weight": torch.ones(3)}, path)
        message = "does not fit the model"
    else:
        path.write_text("no checkpoint")
        message = "checkpoint"
    outcome = kronfac("spectrum", "digits", "--checkpoint", path)
    assert outcome.status == 2
    assert message in outcome.message


def test_curvature_that_is_not_finite_is_a_failed_run(kronfac: Kronfac, tmp_path: Path) -> None:
    assert kronfac("train", f"{HERE}:own_generator", "--epochs", 1, "--out", tmp_path, "--quiet").status == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    torch.save(state | {"0.bias": torch.full((8,), float("nan"))}, tmp_path / "state.pt")
    outcome = kronfac("spectrum", f"{HERE}:own_generator", "--checkpoint", tmp_path / "state.pt", "--top", 1, "--quiet")
    assert outcome.status == 1
    assert f"hessian of {HERE}:own_generator" in outcome.message
