from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from kronfac.cli import analysis
from kronfac.cli.report import spectrum_figures, spectrum_page
from kronfac.cli.report.html import with_error
from kronfac.cli.report.theme import DARK, LIGHT
from kronfac.spectrum import EigenResult, eigsh
from tests.cli import problems_for_tests
from tests.cli.conftest import Kronfac
from tests.cli.test_demo import PNG, Checker

HERE = "tests.cli.problems_for_tests"


def synthetic() -> dict[str, Any]:
    """All fields, a layer without its eigenvalue, a pair that has not converged, and characters that HTML escapes."""
    layer = {
        "name": "features.0",
        "kind": "Conv2d",
        "parameters": 160,
        "trace": 31.25,
        "trace_stderr": 1.5,
        "mean_eigenvalue": 31.25 / 160,
        "frobenius": 12.5,
        "frobenius_stderr": 0.25,
        "top_eigenvalue": 11.11,
        "residual": 2e-6,
        "converged": False,
    }
    other = {key: value for key, value in layer.items() if key not in ("top_eigenvalue", "residual", "converged")}
    other |= {"name": "<head>", "kind": None, "trace": -2.5, "mean_eigenvalue": -0.0125}
    return {
        "problem": "my<module>:build",
        "operator": "ggn",
        "checkpoint": "a&b.pt",
        "device": "cpu",
        "seed": 3,
        "which": "magnitude",
        "tol": 1e-4,
        "precision": 0.01,
        "double": False,
        "examples": 1437,
        "parameters": 6930,
        "interrupted": True,
        "notes": ["Interrupted: density left out.", "1 of 3 eigenpairs did not reach the tolerance."],
        "top_eigenvalues": [12.345, 6.0, -3.0],
        "residuals": [1e-7, 2e-7, 0.3],
        "relative_residuals": [8e-9, 0.0, 0.024],
        "converged": [True, True, False],
        "status": ["converged", "converged", "limit"],
        "products": 77,
        "trace": 40.512,
        "trace_stderr": 0.75,
        "trace_probes": 60,
        "trace_method": "hutchinson",
        "trace_samples": [40.0, 41.0, 39.5, 41.5],
        "layers": [layer, other],
        "density": {
            "grid": [-4.0, 0.0, 4.0, 13.0],
            "values": [1e-9, 1.0, 1e-3, 1e-4],
            "sigma": 0.1,
            "trace": 43.5,
            "trace_stderr": 2.25,
            "squared_frobenius": 400.0,
            "squared_frobenius_stderr": 40.0,
            "products": 800,
            "log": {
                "grid": [-3.0, -2.0, -1.0, 0.0, 1.0],
                "positive": [0.0, 0.1, 0.5, 0.2, 0.001],
                "negative": [0.0, 0.05, 0.1, 0.0, 0.0],
                "sigma": 0.05,
                "threshold": 1e-5,
                "positive_mass": 0.75,
                "negative_mass": 0.125,
                "zero_mass": 0.125,
                "uncertain_mass": 0.0625,
            },
        },
        "landscape": {
            "coordinates": [[-1.0, 0.0, 1.0]],
            "labels": ["along eigenvector 1 (λ = 12.35)"],
            "losses": {"training": [7.0, 0.875, None], "test": [8.0, 1.0625, 7.5]},
            "centre": {"training": 0.875, "test": 1.0625},
            "slopes": {"training": [0.25], "test": [-0.5]},
            "curvatures": {"training": [[12.345]], "test": [[13.0]]},
            "evaluations": 6,
            "interrupted": True,
        },
        "stages": [
            {"name": "eigenvalues", "status": "done", "products": 77, "seconds": 1.5},
            {"name": "trace by layer", "status": "partial", "products": 60, "seconds": 700.0},
            {"name": "density", "status": "left out", "products": 0, "seconds": 0.0},
        ],
        "seconds": 701.5,
        "settings": {"operator": "ggn", "trace": "hutchinson, 100 products"},
        "environment": {"cpu": "A & B <C>", "threads": {"torch": 1, "cpus": 2}},
        "command": "kronfac spectrum 'my<module>:build' --operator ggn",
        "report": "out/report.html",
    }


def only(**fields: Any) -> dict[str, Any]:
    """A report of eigenvalues and these."""
    return synthetic() | {"layers": None, "density": None, "landscape": None, "trace_samples": None} | fields


def laid_out(report: dict[str, Any]) -> tuple[str, Checker]:
    light, dark = spectrum_figures.draw_all(report, LIGHT), spectrum_figures.draw_all(report, DARK)
    assert all(png.startswith(PNG) for png in [*light.values(), *dark.values()])
    assert all(light[name] != dark[name] for name in light)
    text = spectrum_page.render(report, light, dark)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.references) == 2 * len(light)
    assert all(reference.startswith("data:image/png;base64,") for reference in checker.references)
    assert not re.search(r"@import|url\(|<script|<link", text)  # it refers to nothing outside itself
    return text, checker


def test_page() -> None:
    _, checker = laid_out(synthetic())
    assert len(checker.references) == 12
    for shown in (
        "Gauss-Newton matrix of my<module>:build",
        "a&b.pt",
        "12.345",
        "-3",
        "not converged (limit)",
        "6.2% of the eigenvalues are of uncertain decade or sign",
        "6 passes over a data set",
        "training 0.875, test 1.062",
        "40.51 ± 0.75",
        "target 0.01 ✗ missed",
        "features.0 (Conv2d)",
        "<head>",
        "11.11 ± 2e-06 (not converged)",
        "12.50 ± 0.25",
        "43.5 ± 2.2 implied by the density: 1.3 standard errors apart",
        "20.0 ± 1.0",  # the Frobenius norm: the root of 400 ± 40
        "137 products",
        "12 min",
        "left out",
        "A & B <C>",
        "kronfac spectrum 'my<module>:build' --operator ggn",
    ):
        assert shown in checker.text, shown
    assert "partial" in checker.text
    assert "slope and curvature in the middle" in checker.text
    for note in synthetic()["notes"]:
        assert note in checker.text
    # Negative eigenvalues are among them: a share of the trace would be none.
    assert "largest eigenvalues" not in checker.text


def test_page_of_what_there_is() -> None:
    report = only(interrupted=False, notes=[])
    report |= {"stages": report["stages"][:1], "trace": None, "trace_stderr": None, "precision": None}
    _, checker = laid_out(report)
    assert len(checker.references) == 2  # the eigenvalues
    assert "Before you rely" not in checker.text
    assert "partial" not in checker.text
    assert "None" not in checker.text
    nothing = report | {"top_eigenvalues": [], "residuals": [], "relative_residuals": [], "converged": []}
    assert "No eigenvalue and no trace" in laid_out(nothing)[1].text


def test_plane() -> None:
    plane = synthetic()["landscape"] | {
        "coordinates": [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0]],
        "labels": ["one", "two"],
        "losses": {"training": [[7.0, 5.0, 90.0], [1.0, 0.875, 2.0], [None, 9.0, 100.0]], "test": [[8.0] * 3] * 3},
        "slopes": {"training": [0.25, 0.0], "test": [-0.5, 0.0]},
        "curvatures": {"training": [[12.0, 0.0], [0.0, 6.0]], "test": [[13.0, 0.0], [0.0, 5.0]]},
    }
    _, checker = laid_out(only(landscape=plane))
    assert "the plane of the eigenvectors" in checker.text
    assert "Both data sets have the same scale" in checker.text
    constant = {"losses": {"training": [[0.5] * 3] * 3}, "centre": {"training": 0.5}}
    assert "Both data sets" not in laid_out(only(landscape=plane | constant))[1].text


def test_many_layers() -> None:
    one = synthetic()["layers"][0]
    many = [one | {"name": f"blocks.{number}." + "long" * 10} for number in range(40)]
    text, checker = laid_out(only(layers=many))
    assert "The 10 with the smallest traces are in the table only" in checker.text
    assert "<details" in text
    assert all(f"blocks.{number}." in checker.text for number in range(40))


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (14.1449, 0.2789, "14.14 ± 0.28"),
        (0.84284, 0.0448, "0.843 ± 0.045"),
        (123456.0, 789.0, "123456 ± 789"),
        (1.5e-12, 2e-14, "1.5e-12 ± 2e-14"),
        (3.25, 0.0, "3.25 ± 0"),
    ],
)
def test_digits_of_a_value_are_those_its_error_leaves(value: float, error: float, expected: str) -> None:
    assert with_error(value, error) == expected


def interruptible(kronfac: Kronfac, out: Path) -> Any:
    options = ["--layers", "--top", 3, "--trace-probes", 24, "--density-probes", 2, "--density-steps", 6, "--json"]
    return kronfac("spectrum", f"{HERE}:interrupted", *options, "--out", out, "--quiet")


def test_interrupt(kronfac: Kronfac, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = interruptible(kronfac, tmp_path / "whole")
    assert whole.status == 0
    assert not whole.json["interrupted"]

    searches = 0

    def pressing(op: Any, *where: Any, progress: Any, **options: Any) -> EigenResult:
        nonlocal searches
        searches += 1

        def press(done: int, total: int | None) -> None:
            progress(done, total)
            if searches == 2 and done == 3:  # in the middle of the first layer
                os.kill(os.getpid(), signal.SIGINT)

        return eigsh(op, *where, progress=press, **options)

    monkeypatch.setattr(analysis, "eigsh", pressing)
    partial = interruptible(kronfac, tmp_path / "partial")
    assert partial.status == 1
    assert partial.message == f"interrupted; {tmp_path}/partial/report.html holds what had been computed"
    result = partial.json
    assert result["interrupted"]
    assert {stage["name"]: stage["status"] for stage in result["stages"]} == {
        "eigenvalues": "done",
        "trace by layer": "done",
        "eigenvalue by layer": "partial",
        "density": "left out",
    }
    assert sum("top_eigenvalue" in layer for layer in result["layers"]) < len(result["layers"]) == 2
    assert result["density"] is None
    assert result["notes"][0].startswith("Interrupted: ")
    # What was computed is what the whole run has.
    assert result["top_eigenvalues"] == whole.json["top_eigenvalues"]
    assert json.loads((tmp_path / "partial/spectrum.json").read_text()) == result
    page = (tmp_path / "partial/report.html").read_text()
    assert "partial</span>" in page
    assert "Interrupted" in page
    files = sorted(path.name for path in (tmp_path / "partial").iterdir())
    assert files == ["eigenvalues.png", "layers.png", "report.html", "spectrum.json"]


def test_a_part_that_fails_does_not_take_the_others_with_it(
    kronfac: Kronfac, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("no\nluck")

    monkeypatch.setattr(analysis, "density", failing)
    options = ["--top", 1, "--trace-probes", 4, "--landscape", "1d", "--points", 3, "--quiet", "--json"]
    outcome = kronfac("spectrum", f"{HERE}:regression", *options, "--out", tmp_path)
    assert outcome.status == 1
    assert outcome.message == (f"hessian of {HERE}:regression: density: no luck; {tmp_path}/report.html holds the rest")
    assert outcome.json["notes"] == ["Failed: density: no luck"]
    assert {stage["name"]: stage["status"] for stage in outcome.json["stages"]} == {
        "eigenvalues": "done",
        "trace": "done",
        "density": "failed",
        "landscape": "done",
    }
    assert "Failed: density: no luck" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(analysis, "eigsh", failing)
    nothing = kronfac("spectrum", f"{HERE}:regression", "--top", 1, "--trace", "none", "--quiet", "--out", tmp_path)
    assert nothing.status == 1
    assert nothing.message == f"hessian of {HERE}:regression: no luck"


def test_interrupt_before_there_is_anything(kronfac: Kronfac, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(problems_for_tests, "CALLS", (1,))
    outcome = interruptible(kronfac, tmp_path / "out")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.message == "interrupted"
    assert not (tmp_path / "out" / "report.html").exists()


def test_an_older_report_leaves_no_figures(kronfac: Kronfac, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "density.png").write_bytes(b"somebody's own")
    options = ["--top", 1, "--no-density", "--quiet", "--out", out]
    assert kronfac("spectrum", f"{HERE}:regression", *options, "--trace-probes", 4).status == 0
    assert (out / "density.png").exists()  # no report was there, so this is none of ours
    assert (out / "trace.png").exists()
    assert kronfac("spectrum", f"{HERE}:regression", *options, "--trace", "none").status == 0
    assert not (out / "trace.png").exists()
    assert [path.name for path in out.glob("*.png")] == ["eigenvalues.png"]
