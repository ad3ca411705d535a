from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kronfac.cli.checkpoint import read_checkpoint
from tests.cli.conftest import Kronfac
from tests.datasets.files import write_cifar_python, write_mnist

HERE = "tests.cli.problems_for_tests"


def same(first: Any, second: Any) -> bool:
    """Equality bit for bit, through containers."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.mark.parametrize("optimizer", ["sgd", "kfac"])
def test_learns_the_digits(kronfac: Kronfac, tmp_path: Path, optimizer: str) -> None:
    outcome = kronfac("train", "--optimizer", optimizer, "--epochs", 3, "--batch-size", 32, "--json", "--out", tmp_path)
    assert outcome.status == 0
    result = outcome.json
    assert result["problem"] == "digits"
    assert result["settings"]["optimizer"] == optimizer
    assert len(result["train_loss"]) == len(result["test_loss"]) == len(result["seconds"]) == 3
    assert result["train_loss"][-1] < 0.5 * result["train_loss"][0]
    assert result["test_accuracy"][-1] > 0.85
    assert json.loads((tmp_path / "history.json").read_text()) == result
    assert "epoch 3/3" in outcome.err  # the progress bar
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "history.json"]


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        ("digits", ["--optimizer", "sgd", "--lr", "0.02"]),
        (f"{HERE}:classifier", ["--optimizer", "rmsprop", "--momentum", "0.5", "--alpha", "0.9"]),
        (f"{HERE}:classifier", ["--optimizer", "nadam", "--beta1", "0.8"]),
        (f"{HERE}:own_generator", ["--optimizer", "ekfac", "--inverse-every", "3"]),
        ("digits", ["--optimizer", "kfac", "--damping", "0.3", "--lr", "0.05", "--inverse-every", "7"]),
        (f"{HERE}:classifier", ["--optimizer", "kfac", "--fisher", "exact", "--solve", "eigen"]),
        (f"{HERE}:own_generator", ["--optimizer", "sgd", "--seed", "5"]),
    ],
)
def test_resume_continues_bit_for_bit(kronfac: Kronfac, tmp_path: Path, problem: str, options: list[str]) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert kronfac("train", problem, *options, "--epochs", 3, "--out", straight).status == 0
    assert kronfac("train", problem, *options, "--epochs", 1, "--out", halves).status == 0
    torch.rand(7)  # whatever else the process draws
    outcome = kronfac("train", "--resume", "--epochs", 3, "--out", halves, "--json")
    assert outcome.status == 0
    assert outcome.json["resumed_from_epoch"] == 1
    first, second = read_checkpoint(straight / "checkpoint.pt"), read_checkpoint(halves / "checkpoint.pt")
    for content in (first, second):
        content["history"].pop("seconds")
    assert first["epoch"] == 3
    assert all(same(first[name], second[name]) for name in first)


def test_resume_of_a_finished_run_changes_nothing(kronfac: Kronfac, tmp_path: Path) -> None:
    first = kronfac("train", f"{HERE}:classifier", "--epochs", 2, "--out", tmp_path, "--json")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    again = kronfac("train", "--resume", "--epochs", 2, "--out", tmp_path, "--json")
    assert again.status == 0
    assert again.json["train_loss"] == first.json["train_loss"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_settings(kronfac: Kronfac, tmp_path: Path) -> None:
    run = ["train", f"{HERE}:classifier", "--optimizer", "sgd", "--epochs", 1, "--out", tmp_path]
    assert kronfac(*run, "--lr", 0.1).status == 0
    assert kronfac(*run, "--resume", "--lr", 0.1).status == 0
    outcome = kronfac(*run, "--resume", "--lr", 0.2)
    assert (outcome.status, outcome.message) == (2, "--resume: --lr 0.2 differs from the checkpoint's 0.1")
    outcome = kronfac("train", "digits", "--out", tmp_path, "--resume")
    assert outcome.status == 2
    assert "PROBLEM digits differs" in outcome.message


def test_an_existing_checkpoint_is_not_overwritten(kronfac: Kronfac, tmp_path: Path) -> None:
    run = ["train", f"{HERE}:classifier", "--epochs", 1, "--quiet", "--out", tmp_path]
    assert kronfac(*run).status == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    outcome = kronfac(*run, "--seed", 1)
    assert outcome.status == 2
    assert "--resume" in outcome.message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert kronfac(*run, "--seed", 1, "--force").status == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() != before


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize(
    "damage", ["cut", "cut to nothing", "flipped", "text", "other torch file", "attack", "no model"]
)
def test_damaged_or_foreign_checkpoint(
    kronfac: Kronfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sys_path = list(sys.path)
    path = tmp_path / "checkpoint.pt"
    assert kronfac("train", "--optimizer", "sgd", "--epochs", 1, "--quiet", "--out", tmp_path).status == 0
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "cut to nothing":
        path.write_bytes(b"")
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(256) + content[middle + 256 :])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "other torch file":
        torch.save({"weights": torch.ones(3)}, path)
    elif damage == "attack":
        path.write_bytes(pickle.dumps(_Attack()))
    else:
        saved = torch.load(path, weights_only=True)
        del saved["model"]
        torch.save(saved, path)
    before = path.read_bytes()
    outcome = kronfac("train", "--resume", "--epochs", 2, "--quiet", "--out", tmp_path)
    assert outcome.status == 2
    assert "checkpoint.pt" in outcome.message
    assert path.read_bytes() == before
    assert not (tmp_path / "harmed").exists()
    assert sys.path == sys_path


def test_checkpoint_of_another_shape(kronfac: Kronfac, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert kronfac("train", f"{HERE}:classifier", "--epochs", 1, "--quiet", "--out", tmp_path).status == 0
    saved = torch.load(path, weights_only=True)
    saved["model"]["1.weight"] = torch.zeros(8, 5)
    torch.save(saved, path)
    outcome = kronfac("train", "--resume", "--epochs", 2, "--quiet", "--out", tmp_path)
    assert outcome.status == 2
    assert "'1.weight' is (8, 5), expected (8, 6)" in outcome.message


def test_divergence_is_a_failed_run(kronfac: Kronfac, tmp_path: Path) -> None:
    outcome = kronfac("train", "--optimizer", "sgd", "--lr", 3e38, "--epochs", 3, "--quiet", "--out", tmp_path)
    assert outcome.status == 1
    assert "diverged in epoch 1" in outcome.message
    assert not (tmp_path / "checkpoint.pt").exists()  # NaN is nothing to continue from


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_files_on_disk(kronfac: Kronfac, tmp_path: Path, name: str) -> None:
    write = {"mnist": lambda: write_mnist(tmp_path, compress=True), "cifar10": lambda: write_cifar_python(tmp_path)}
    write[name]()
    outcome = kronfac("train", name, "--data-dir", tmp_path, "--epochs", 2, "--batch-size", 16, "--quiet", "--json")
    assert outcome.status == 0
    assert outcome.json["train_loss"][1] < outcome.json["train_loss"][0]


def test_own_problem_without_test_data(kronfac: Kronfac) -> None:
    outcome = kronfac("train", f"{HERE}:regression", "--likelihood", "gaussian", "--epochs", 5, "--quiet", "--json")
    assert outcome.status == 0
    result = outcome.json
    assert result["test_loss"] == result["test_accuracy"] == [None] * 5
    assert result["train_loss"][-1] < result["train_loss"][0]
    text = kronfac("train", f"{HERE}:regression", "--likelihood", "gaussian", "--epochs", 1, "--quiet")
    assert text.status == 0
    assert "train loss" in text.out


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("iterator", "ends after one epoch"),
        ("frozen", "no parameter that requires gradients"),
        ("two_values", "expected (model, loss_fn, loaders), got 2 values"),
        ("no_module", "got str for the model"),
        ("no_data", "yields no batch"),
    ],
)
def test_own_problem_of_the_wrong_form(kronfac: Kronfac, function: str, message: str) -> None:
    outcome = kronfac("train", f"{HERE}:{function}", "--optimizer", "sgd", "--quiet")
    assert outcome.status == 2
    assert message in outcome.message


def test_own_problem_brings_its_own_batches(kronfac: Kronfac) -> None:
    outcome = kronfac("train", f"{HERE}:regression", "--batch-size", 8)
    assert outcome.status == 2
    assert "--batch-size" in outcome.message


def test_a_problem_that_says_its_likelihood(kronfac: Kronfac) -> None:
    outcome = kronfac("train", f"{HERE}:two_parts", "--epochs", 2, "--json", "--quiet")
    assert outcome.status == 0
    assert outcome.json["settings"]["likelihood"].startswith("Gaussian")
    assert outcome.json["train_loss"][1] < outcome.json["train_loss"][0]
