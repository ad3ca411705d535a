"""Bad usage and bad data: one line, exit status 2, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Kronfac
from tests.datasets.files import write_cifar_python, write_mnist

HERE = "tests.cli.problems_for_tests"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--bad"], "No such option: --bad"),
        (["train", "--lr", "fast"], "Invalid value for '--lr'"),
        (["train", "--lr", "nan"], "--lr: expected a finite number, at least 0, got nan"),
        (["train", "--damping", "-1"], "--damping: expected a finite number, at least 0, got -1.0"),
        (["train", "--damping", "0"], "damping"),
        (["train", "--momentum", "1.5"], "momentum"),
        (["train", "--epochs", "0"], "Invalid value for '--epochs'"),
        (["train", "--optimizer", "adagrad"], "--optimizer adagrad: expected kfac, ekfac, sgd, momentum, nesterov"),
        (["train", "--optimizer", "sgd", "--damping", "1"], "--optimizer kfac, ekfac or gauss-newton-cg only, not to"),
        (["train", "--optimizer", "sgd", "--solve", "eigen"], "--solve applies to --optimizer kfac only, not to sgd"),
        (["train", "--optimizer", "adam", "--momentum", "0"], "--momentum applies to --optimizer kfac, ekfac, sgd"),
        (["train", "--optimizer", "rmsprop", "--eps", "inf"], "--eps: expected a finite number, at least 0, got inf"),
        (["train", "--optimizer", "adam", "--beta2", "1"], "beta"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--resume", "--force", "--out", "x"], "give one of them"),
        (["train", "--device", "nonsense"], "--device nonsense"),
        (["train", "imagenet"], "unknown problem 'imagenet': expected digits, mnist, cifar10 or module:function"),
        (["train", "mnist"], "--data-dir"),
        (["train", "mnist", "--data-dir", "/nowhere/at/all"], "directory /nowhere/at/all does not exist"),
        (["train", "no_such_module_here:build"], "there is no module 'no_such_module_here'"),
        (["train", "os:no_such_function"], "os has no function 'no_such_function'"),
        (["train", "os:getcwd"], "expected (model, loss_fn, loaders), got str"),
        (["train", "not a module:f"], "expected module:function"),
        (["spectrum", "--top", "0"], "Invalid value for '--top'"),
        (["spectrum", "--top", "7000"], "--top: expected at most 6930"),
        (["spectrum", "--tol", "nan"], "--tol: expected a number between 0 and 1"),
        (["spectrum", "--trace-probes", "1"], "--trace-probes: expected 0 or at least 2"),
        (["spectrum", "--trace", "xtrace", "--trace-probes", "3"], "--trace-probes: expected 0 or at least 4"),
        (["spectrum", "--trace", "hutch"], "Invalid value for '--trace'"),
        (["spectrum", "--precision", "2"], "--precision: expected a share of the trace between 0 and 1, got 2.0"),
        (["spectrum", "--precision", "0.1", "--trace", "none"], "--precision is that of the trace"),
        (["spectrum", "--precision", "0.1", "--trace", "hutch++"], "use --trace xtrace"),
        (["spectrum", "--precision", "0.1", "--trace-probes", "8"], "expected at least 16 with --precision"),
        (["spectrum", "--landscape", "2d", "--top", "1"], "--landscape 2d: needs --top 2 or more, got 1"),
        (["spectrum", "--radius", "inf"], "--radius: expected a finite number greater than 0, got inf"),
        (["spectrum", "--density", "log", "--no-density"], "--no-density contradicts --density log"),
        (["spectrum", "--fisher", "mc"], "--fisher applies to --operator fisher only"),
        (["spectrum", f"{HERE}:regression", "--operator", "fisher"], "Say so with --likelihood"),
        (["spectrum", f"{HERE}:two_parts", "--operator", "fisher", "--likelihood", "gaussian"], "says itself"),
        (["train", f"{HERE}:two_parts", "--likelihood", "gaussian"], "says itself"),
        (["spectrum", f"{HERE}:triples"], "batch 0 of the training data: expected (inputs, targets), got 3 values"),
        (["spectrum", f"{HERE}:unreadable"], "reading the training data failed: OSError: disk on fire"),
        (["spectrum", f"{HERE}:two_values"], "expected (model, loss_fn, loaders), got 2 values"),
        (["spectrum", f"{HERE}:no_module"], "got str for the model"),
        (["spectrum", f"{HERE}:no_data"], "the training loader yields no batch"),
        (["spectrum", f"{HERE}:iterator"], "is an iterator and ends after one epoch"),
        (["spectrum", "--checkpoint", "/nowhere/checkpoint.pt"], "no such checkpoint"),
        (["demo", "--seeds", "0"], "Invalid value for '--seeds'"),
    ],
)
def test_usage(kronfac: Kronfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    outcome = kronfac(*arguments)
    assert outcome.status == 2
    assert message in outcome.message
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "spectrum"])
def test_truncated_data(kronfac: Kronfac, tmp_path: Path, command: str) -> None:
    write_mnist(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-50])
    outcome = kronfac(command, "mnist", "--data-dir", tmp_path)
    assert outcome.status == 2
    assert "train-images-idx3-ubyte.gz: truncated" in outcome.message

    write_cifar_python(tmp_path)
    path = tmp_path / "data_batch_4"
    path.write_bytes(path.read_bytes()[:-50])
    outcome = kronfac(command, "cifar10", "--data-dir", tmp_path)
    assert outcome.status == 2
    assert "data_batch_4: truncated" in outcome.message


@pytest.mark.parametrize("command", [["train", "--epochs", "1"], ["spectrum"], ["demo", "--epochs", "1"]])
def test_out_that_cannot_be_a_directory(kronfac: Kronfac, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = kronfac(*command, "--quiet", "--out", tmp_path / "file")
    assert outcome.status == 2
    assert "file" in outcome.message
    assert (tmp_path / "file").read_text() == "mine"


def test_help_names_the_commands(kronfac: Kronfac) -> None:
    outcome = kronfac("--help")
    assert outcome.status == 0
    assert all(command in outcome.out for command in ("demo", "train", "spectrum", "info"))
    for command in ("demo", "train", "spectrum"):
        assert kronfac(command, "--help").status == 0


def test_nothing_given_shows_the_help(kronfac: Kronfac) -> None:
    outcome = kronfac()
    assert outcome.status == 2
    assert "train" in outcome.out + outcome.err


def test_installed_command(tmp_path: Path) -> None:
    # Once for real: another process, another directory, the user's own module beside it.
    (tmp_path / "broken_problem.py").write_text("def build():\n    raise OSError('disk on fire\\nreally')\n")
    done = subprocess.run(
        [sys.executable, "-m", "kronfac.cli", "train", "broken_problem:build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "kronfac: broken_problem:build failed: OSError: disk on fire really (broken_problem.py, line 2)\n"
    )
