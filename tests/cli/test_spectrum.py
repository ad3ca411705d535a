from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kronfac.cli.analysis import SpectrumOptions, analyse
from kronfac.cli.problems import fixed_batches, fixed_test_batches, load_problem
from tests.cli.conftest import Kronfac
from tests.cli.problems_for_tests import regression_data
from tests.datasets.files import write_cifar_python, write_mnist
from tests.operators.state import unchanged

HERE = "tests.cli.problems_for_tests"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without --out the report is written where the command is run."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


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
    options = ["--top", 3, "--trace-probes", 4, "--density-probes", 2, "--density-steps", 10, "--examples", 100]
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
        "report.html",
        "spectrum.json",
        "trace.png",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    density = result["density"]
    width = density["grid"][1] - density["grid"][0]
    assert abs(sum(density["values"]) * width - 1) < 1e-3

    options = ["--top", 3, "--trace", "none", "--no-density", "--examples", 100]
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


def test_cifar10_from_files(kronfac: Kronfac, tmp_path: Path) -> None:
    write_cifar_python(tmp_path)
    options = ["--data-dir", tmp_path, "--top", 1, "--tol", 0.1, "--trace", "none", "--no-density", "--quiet", "--json"]
    outcome = kronfac("spectrum", "cifar10", *options, "--examples", 8)
    assert outcome.status == 0
    assert (outcome.json["parameters"], outcome.json["examples"], outcome.json["trace"]) == (75_818, 8, None)


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


def two_parts_hessian() -> torch.Tensor:
    """Of half the mean of squares: (1/N) Σ zzᵀ, z the columns of both layers: weight and bias left, weight right."""
    x = regression_data()[0].double()
    z = torch.cat([x[:, :3], torch.ones(24, 1, dtype=torch.float64), x[:, 3:]], dim=1)
    return z.T @ z / 24


@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
def test_layers(kronfac: Kronfac, method: str) -> None:
    H = two_parts_hessian()
    options = ["--layers", "--trace", method, "--trace-probes", 300, "--top", 2, "--no-density", "--json", "--quiet"]
    outcome = kronfac("spectrum", f"{HERE}:two_parts", *options)
    assert outcome.status == 0
    assert outcome.json["notes"] == []
    layers = {layer["name"]: layer for layer in outcome.json["layers"]}
    rows = {"left": slice(0, 4), "right": slice(4, 6)}
    assert layers.keys() == rows.keys()
    assert list(layers) == sorted(layers, key=lambda name: -layers[name]["trace"])
    for name, mine in rows.items():
        layer, block = layers[name], H[mine, mine]
        assert (layer["kind"], layer["parameters"]) == ("Linear", len(block))
        assert layer["top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-5)
        assert layer["converged"]
        assert abs(layer["trace"] - float(block.trace())) <= 5 * layer["trace_stderr"]
        assert 0 < layer["trace_stderr"] < 0.1 * layer["trace"]
        assert layer["mean_eigenvalue"] == pytest.approx(layer["trace"] / len(block))
        assert abs(layer["frobenius"] - float(H[mine].norm())) <= 5 * layer["frobenius_stderr"]
    assert abs(outcome.json["trace"] - float(H.trace())) <= max(5 * outcome.json["trace_stderr"], 1e-5)
    stages = {stage["name"]: stage for stage in outcome.json["stages"]}
    assert all(stage["status"] == "done" for stage in stages.values())
    # One series of products where Hutchinson's probes serve the whole matrix too.
    assert ("trace" in stages) == (method == "xtrace")


def test_groups_of_the_users_own(kronfac: Kronfac) -> None:
    options = ["--layers", "--trace-probes", 200, "--top", 1, "--no-density", "--quiet"]
    outcome = kronfac("spectrum", f"{HERE}:grouped", *options, "--json")
    assert outcome.status == 0
    layers = {layer["name"]: layer for layer in outcome.json["layers"]}
    assert {name: layer["parameters"] for name, layer in layers.items()} == {"weights": 5, "<bias> & more": 1}
    # The bias's second derivative is 2, whatever the data.
    assert layers["<bias> & more"]["top_eigenvalue"] == pytest.approx(2.0, rel=1e-5)
    page = Path("spectrum-report/report.html").read_text()
    assert "&lt;bias&gt; &amp; more" in page
    assert "<bias>" not in page


@pytest.mark.parametrize(("kind", "double"), [("exact", []), ("mc", ["--double"])])
def test_fisher(kronfac: Kronfac, kind: str, double: list[str]) -> None:
    options = ["--operator", "fisher", "--fisher", kind, "--top", 6, "--no-density", "--json", "--quiet", *double]
    outcome = kronfac("spectrum", f"{HERE}:two_parts", *options)
    assert outcome.status == 0
    H = two_parts_hessian()
    values = torch.tensor(outcome.json["top_eigenvalues"], dtype=torch.float64)
    if kind == "exact":
        assert torch.allclose(values, torch.linalg.eigvalsh(H).flip(0), rtol=1e-5)
    else:  # one draw of each target: another matrix, whose trace is that of its eigenvalues
        assert not torch.allclose(values, torch.linalg.eigvalsh(H).flip(0), rtol=1e-2)
        assert abs(outcome.json["trace"] - float(values.sum())) <= 5 * outcome.json["trace_stderr"]


def test_precision(kronfac: Kronfac) -> None:
    options = ["--precision", 0.02, "--top", 1, "--no-density", "--json", "--quiet"]
    found = kronfac("spectrum", f"{HERE}:regression", *options).json
    assert 0 < found["trace_stderr"] <= 0.02 * found["trace"]
    assert found["trace_probes"] > 16
    assert found["notes"] == []
    exact = float(regression_hessian().trace())
    assert abs(found["trace"] - exact) <= 5 * found["trace_stderr"]

    short = kronfac("spectrum", f"{HERE}:regression", *options, "--trace-probes", 20)
    assert short.status == 0  # an honest status, in place of an error that would throw the rest away
    assert short.json["trace_probes"] == 20
    assert short.json["notes"] == [
        f"The standard error of the trace is {short.json['trace_stderr'] / short.json['trace']:.2g} of it; "
        "0.02 was asked for."
    ]


def test_both_ends(kronfac: Kronfac) -> None:
    options = ["--which", "both", "--top", 4, "--trace", "none", "--no-density", "--double", "--json", "--quiet"]
    outcome = kronfac("spectrum", f"{HERE}:regression", *options)
    assert outcome.status == 0
    exact = torch.linalg.eigvalsh(regression_hessian()).flip(0)
    expected = torch.cat([exact[:2], exact[-2:]])
    assert torch.allclose(torch.tensor(outcome.json["top_eigenvalues"], dtype=torch.float64), expected, rtol=1e-8)
    assert "Eigenvalues of both ends" in Path("spectrum-report/report.html").read_text()


@pytest.mark.parametrize("directions", [1, 2])
def test_landscape_of_least_squares(kronfac: Kronfac, directions: int) -> None:
    options = ["--landscape", f"{directions}d", "--radius", 2, "--points", 5, "--top", 2, "--trace", "none", "--quiet"]
    outcome = kronfac("spectrum", f"{HERE}:two_parts", *options, "--density", "log", "--density-probes", 2, "--json")
    assert outcome.status == 0
    found = outcome.json["landscape"]
    axis = torch.tensor(found["coordinates"][0], dtype=torch.float64)
    assert axis.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert len(found["coordinates"]) == directions
    # The loss is a quadratic function, whose curvatures along eigenvectors are the eigenvalues.
    slopes = torch.tensor(found["slopes"]["training"], dtype=torch.float64)
    values = torch.linalg.eigvalsh(two_parts_hessian()).flip(0)[:directions]
    steps = torch.stack(torch.meshgrid(*[axis] * directions, indexing="ij"), dim=-1)
    expected = found["centre"]["training"] + steps @ slopes + 0.5 * steps.square() @ values
    losses = torch.tensor(found["losses"]["training"], dtype=torch.float64)
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-5)

    # Of 6 eigenvalues, all positive, Lanczos finds every one.
    log = outcome.json["density"]["log"]
    assert (log["positive_mass"], log["negative_mass"]) == (pytest.approx(1.0), 0.0)
    files = {path.name for path in Path("spectrum-report").iterdir()}
    assert {"decades.png", "density.png", "landscape.png"} <= files


def test_single_batch(kronfac: Kronfac) -> None:
    outcome = kronfac("spectrum", f"{HERE}:single_batch", "--top", 1, "--no-density", "--json", "--quiet")
    assert outcome.status == 0
    assert outcome.json["examples"] == 24
    expected = float(torch.linalg.eigvalsh(regression_hessian())[-1])
    assert outcome.json["top_eigenvalues"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("not_scalar", "scalar"),
        ("breaking", "KeyError: 'no such\\nkey' (problems_for_tests.py, line"),
    ],
)
def test_a_problem_that_cannot_be_looked_at(kronfac: Kronfac, problem: str, message: str) -> None:
    outcome = kronfac("spectrum", f"{HERE}:{problem}", "--top", 1, "--quiet")
    assert outcome.status == 1
    assert message in outcome.message


def test_the_model_and_its_surroundings_are_left_alone() -> None:
    problem = load_problem(f"{HERE}:classifier", seed=3)
    options = SpectrumOptions(
        top=2,
        layers=True,
        landscape=1,
        landscape_points=3,
        trace="xtrace",
        trace_probes=8,
        density_probes=2,
        density_steps=4,
    )
    # Before: a DataLoader draws from the global stream, as it should.
    problem = replace(problem, ordered=fixed_batches(problem), test=fixed_test_batches(problem))
    problem.model[3].eval()  # one layer in another mode than the others
    with unchanged(problem.model):
        analyse(problem, replace(options, double=True))
