"""The table of optimizers of `kronfac train`: what it builds is torch's own with the values asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kronfac.cli.checkpoint import read_checkpoint
from kronfac.cli.errors import UsageError
from kronfac.cli.optimizers import OPTIMIZERS, Settings, make_optimizer
from tests.cli.conftest import Kronfac
from tests.cli.problems_for_tests import classifier
from tests.cli.test_train import HERE

FIRST_ORDER = {
    "sgd": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9}),
    "momentum": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.003}),
    "adam": (torch.optim.Adam, {"lr": 0.003}),
    "nadam": (torch.optim.NAdam, {"lr": 0.003}),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_training_is_that_of_torch_in_a_plain_loop(kronfac: Kronfac, tmp_path: Path, name: str) -> None:
    arguments = ["--optimizer", name, "--epochs", 2, "--seed", 3, "--weight-decay", 0.01]
    assert kronfac("train", f"{HERE}:classifier", *arguments, "--quiet", "--out", tmp_path).status == 0
    saved = read_checkpoint(tmp_path / "checkpoint.pt")

    from kronfac.cli.problems import load_problem

    problem = load_problem(f"{HERE}:classifier", seed=3)
    kind, options = FIRST_ORDER[name]
    optimizer = kind(problem.model.parameters(), weight_decay=0.01, **options)  # type: ignore[operator]
    for _ in range(2):
        problem.model.train()
        for x, y in problem.train:
            optimizer.zero_grad()
            problem.loss_fn(problem.model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        list(problem.test or ())  # a loader draws its base seed from the global stream
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, saved["model"][key]), key


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("adam", {"beta1": 0.5, "beta2": 0.9, "eps": 1.0}, {"betas": (0.5, 0.9), "eps": 1.0}),
        ("nadam", {"beta2": 0.9, "momentum_decay": 0.1}, {"betas": (0.9, 0.9), "momentum_decay": 0.1}),
        ("rmsprop", {"alpha": 0.5, "momentum": 0.25}, {"alpha": 0.5, "momentum": 0.25}),
        ("nesterov", {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}),
        ("ekfac", {"damping": 0.5, "factor_every": 3}, {"damping": 0.5, "factor_every": 3}),
    ],
)
def test_options_reach_the_optimizer(name: str, options: dict[str, Any], expected: dict[str, Any]) -> None:
    model = nn.Linear(3, 2)
    group = make_optimizer(Settings(name, 0.2, **options), model, seed=0).param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == 0.2


def test_every_entry_builds_with_its_defaults_and_says_what_it_used() -> None:
    model = classifier()[0]
    for name, entry in OPTIMIZERS.items():
        settings = Settings(name)
        optimizer = make_optimizer(settings, copy.deepcopy(model), seed=0, examples=90)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert settings.used() == {"optimizer": name, **entry.options}


def test_settings_refuse_what_is_not_in_the_table() -> None:
    with pytest.raises(UsageError, match="unknown optimizer 'adagrad': expected kfac"):
        Settings("adagrad")
    with pytest.raises(UsageError, match="sgd has no option 'damping': expected lr, momentum, weight_decay"):
        Settings("sgd", damping=0.1)
    with pytest.raises(UsageError, match="Nesterov momentum requires a momentum"):
        make_optimizer(Settings("nesterov", momentum=0.0), nn.Linear(2, 1), seed=0)


def test_history_counts_updates_and_propagations(kronfac: Kronfac) -> None:
    result = kronfac("train", f"{HERE}:regression", "--optimizer", "adam", "--epochs", 3, "--quiet", "--json").json
    assert result["updates"] == [3, 6, 9]
    assert result["propagations"] == [24, 48, 72]
    assert result["batch_size"] == [12] * 3
    assert result["lr"] == [0.003] * 3


def test_resume_of_a_checkpoint_from_before_there_were_these_options(kronfac: Kronfac, tmp_path: Path) -> None:
    run = ["train", f"{HERE}:classifier", "--quiet", "--json", "--out", tmp_path]
    assert kronfac(*run, "--optimizer", "sgd", "--epochs", 1).status == 0
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["config"]["epochs"]
    saved["config"] |= {"damping": 0.01, "kl_clip": 1e-4, "solve": "inverse"}  # all of K-FAC's were in every file
    for name in ("lr", "batch_size", "updates", "propagations"):
        del saved["history"][name]
    torch.save(saved, path)
    result = kronfac(*run, "--resume", "--epochs", 2).json
    assert result["resumed_from_epoch"] == 1
    assert result["updates"] == [None, None]
    assert result["lr"] == [None, 0.03]
    assert kronfac("train", "--quiet", "--out", tmp_path, "--resume", "--epochs", 2).status == 0  # the summary


def test_resume_takes_the_number_of_epochs_from_the_checkpoint(
    kronfac: Kronfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kronfac.cli import training_run

    original, saves = training_run.save_checkpoint, []

    def interrupted(*arguments: Any) -> None:
        original(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "save_checkpoint", interrupted)
        outcome = kronfac("train", f"{HERE}:classifier", "--epochs", 4, "--quiet", "--out", tmp_path)
        assert (outcome.status, outcome.message) == (1, "interrupted")
    result = kronfac("train", "--resume", "--quiet", "--json", "--out", tmp_path).json
    assert (result["resumed_from_epoch"], result["epochs"]) == (2, 4)
    outcome = kronfac("train", "--resume", "--optimizer", "sgd", "--out", tmp_path)
    assert "--optimizer sgd differs from the checkpoint's kfac" in outcome.message
    outcome = kronfac("train", "--resume", "--beta1", "0.5", "--out", tmp_path)
    assert "--beta1 applies to --optimizer adam or nadam only, not to kfac" in outcome.message
