from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from kronfac import datasets
from kronfac.cli import comparison
from kronfac.cli.report import figures, page
from tests.cli.conftest import Kronfac

PNG = b"\x89PNG\r\n\x1a\n"


def synthetic(reached: int | None = 2) -> dict[str, Any]:
    """A report with all fields, one diverged setting, and characters that HTML has to escape."""

    def run(optimizer: str, seed: int) -> dict[str, Any]:
        return {
            "optimizer": optimizer,
            "seed": seed,
            "epochs": 4,
            "steps": 92,
            "initial_train_loss": 2.3,
            "train_loss": [1.0, 0.1 + 0.01 * seed, 0.05, 0.01],
            "test_accuracy": [0.8, 0.95, 0.97, 0.98],
            "seconds": 0.4,
            "seconds_at_epoch": [0.1, 0.2, 0.3, 0.4],
        }

    def setting(optimizer: str, lr: float, losses: list[float | None], **more: Any) -> dict[str, Any]:
        median = sorted(losses, key=lambda loss: 1e9 if loss is None else loss)[1]
        ended = sum(loss is None for loss in losses)
        more |= {"final_train_loss": losses, "median_final_train_loss": median, "diverged": ended}
        return {"optimizer": optimizer, "lr": lr, "momentum": 0.9} | more

    def spectrum(optimizer: str) -> dict[str, Any]:
        return {
            "optimizer": optimizer,
            "seed": 1,
            "examples": 1437,
            "parameters": 6930,
            "top_eigenvalues": [12.345, 6.0, -3.0],
            "residuals": [1e-7, 2e-7, 3e-6],
            "relative_residuals": [8e-9, 1.6e-8, 2.4e-7],
            "trace": 40.5,
            "trace_stderr": 0.75,
            "trace_probes": 60,
            "density": {"grid": [-4.0, 0.0, 4.0, 13.0], "values": [1e-9, 1.0, 1e-3, 1e-4], "sigma": 0.1},
        }

    sgd = [setting("sgd", lr, [0.1 / lr, 0.2 / lr, 0.3 / lr]) for lr in (0.1, 1.0)]
    sgd.append(setting("sgd", 10.0, [0.5, None, None]))
    kfac = [setting("kfac", 0.1, [0.001, 0.002, 0.003], damping=d, kl_clip=None) for d in (0.01, 0.1)]
    return {
        "summary": {
            "epochs": 4,
            "sgd_final_train_loss": 0.0421,
            "kfac_final_train_loss": 0.00789,
            "kfac_epochs_to_sgd_final_loss": reached,
            "epoch_ratio": None if reached is None else reached / 4,
            "seconds_ratio": None if reached is None else 1.25,
            "sgd_test_accuracy": 0.9811,
            "kfac_test_accuracy": 0.9922,
            "sgd_seconds": 0.4,
            "kfac_seconds": 0.9,
            "targets": {"half_the_epochs": reached is not None, "test_accuracy": True, "residuals": True},
        },
        "config": {
            "dataset": "digits",
            "train_examples": 1437,
            "test_examples": 360,
            "parameters": 6930,
            "epochs": 4,
            "batch_size": 64,
            "seeds": [0, 1, 2],
            "protocol": "best of <all> & honest",
        },
        "chosen": {"sgd": sgd[1], "kfac": kfac[0]},
        "grid": [*sgd, *kfac],
        "runs": [run(optimizer, seed) for optimizer in ("sgd", "kfac") for seed in range(3)],
        "spectra": [spectrum("sgd"), spectrum("kfac")],
        "environment": {"cpu": "A & B <C>", "threads": {"torch": 1, "cpus": 2}},
    }


class Checker(HTMLParser):
    """Collects text and references, and requires that tags close in order."""

    void = ("meta", "img", "source")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.mark.parametrize("reached", [2, None])
def test_page(reached: int | None) -> None:
    report = synthetic(reached)
    light, dark = figures.draw_all(report, figures.LIGHT), figures.draw_all(report, figures.DARK)
    assert all(png.startswith(PNG) for png in [*light.values(), *dark.values()])
    assert all(light[name] != dark[name] for name in light)
    text = page.render(report, light, dark)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.references) == 10  # five figures in two themes
    assert all(reference.startswith("data:image/png;base64,") for reference in checker.references)
    assert not re.search(r"@import|url\(|<script|<link", text)  # it refers to nothing outside itself
    for shown in ("0.0421", "0.00789", "99.2%", "98.1%", "12.345", "-3", "40.5 ± 0.75", "best of <all> & honest"):
        assert shown in checker.text
    assert "A & B <C>" in checker.text
    assert "diverged" in checker.text
    if reached is None:
        assert "not reached" in checker.text
        assert "✗ missed" in checker.text
    else:
        assert "2 of 4 epochs" in checker.text
        assert "✗" not in checker.text


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a part of the digits and of the grids."""
    full = datasets.load("digits")
    small = datasets.Dataset("digits", full.train.head(160), full.test.head(60), 10, full.mean, full.std)
    monkeypatch.setattr(datasets, "load", lambda name: small)
    monkeypatch.setattr(comparison, "SGD_RATES", (0.02, 0.1, 3e38))
    monkeypatch.setattr(comparison, "KFAC_RATES", (0.1,))
    monkeypatch.setattr(comparison, "KFAC_DAMPINGS", (0.03, 0.1))


@pytest.mark.slow
@pytest.mark.usefixtures("small_demo")
def test_demo(kronfac: Kronfac, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    outcome = kronfac("demo", "--out", tmp_path, "--epochs", 4, "--seeds", 3, "--json")
    assert outcome.status == 0, outcome.err
    assert torch.get_num_threads() == threads
    assert "SGD" in outcome.err  # the progress bars
    assert "density" in outcome.err
    names = ("accuracy.png", "density.png", "loss_seconds.png", "loss_steps.png", "rates.png", "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "report.json"])
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert outcome.json["epochs"] == report["summary"]["epochs"] == 4

    assert [run["optimizer"] for run in report["runs"]] == ["sgd"] * 3 + ["kfac"] * 3
    for run in report["runs"]:
        assert len(run["train_loss"]) == len(run["test_accuracy"]) == len(run["seconds_at_epoch"]) == 4
        assert run["seconds"] == run["seconds_at_epoch"][-1] > 0
        assert run["train_loss"][-1] < run["initial_train_loss"]
    starts = [run["initial_train_loss"] for run in report["runs"]]
    assert starts[:3] == starts[3:]  # both optimizers start from the same networks
    assert len(set(starts)) == 3

    assert [spectrum["optimizer"] for spectrum in report["spectra"]] == ["sgd", "kfac"]
    for spectrum in report["spectra"]:
        assert len(spectrum["top_eigenvalues"]) == len(spectrum["residuals"]) == 10
        assert max(spectrum["residuals"]) <= 1e-3 * abs(spectrum["top_eigenvalues"][0])
        assert spectrum["trace_stderr"] > 0
        assert spectrum["examples"] == 160

    tried = [one for one in report["grid"] if one["optimizer"] == "sgd"]
    chosen = report["chosen"]["sgd"]
    assert not report["config"]["best_sgd_rate_at_grid_edge"]
    assert chosen["median_final_train_loss"] == min(
        one["median_final_train_loss"] for one in tried if one["median_final_train_loss"] is not None
    )
    assert [one["diverged"] for one in tried if one["lr"] == 3e38] == [3]
    finals = sorted(run["train_loss"][-1] for run in report["runs"][:3])
    assert report["summary"]["sgd_final_train_loss"] == finals[1]
