"""`kronfac train` with the optimizers that choose their own examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kronfac.cli.checkpoint import read_checkpoint
from kronfac.cli.optimizers import OPTIMIZERS, Settings, make_optimizer
from kronfac.cli.problems import load_problem
from kronfac.optim.newton import TRCG
from tests.cli.conftest import Kronfac
from tests.cli.test_schedules import interrupt
from tests.cli.test_train import HERE, same

CLOSURE = [name for name, entry in OPTIMIZERS.items() if entry.closure]
OPTIONS = {
    "trcg": ["--radius-rule", "classical", "--ratio-sample", "gradient", "--radius", "2"],
    "newton-minres": ["--tolerance", "0.3"],
    "cubic-newton": ["--sigma", "0.5", "--curvature", "ggn"],
    "gauss-newton-cg": ["--damping", "0.3", "--ratio-sample", "60", "--curvature", "fisher"],
}


def run(name: str, *more: Any) -> list[Any]:
    samples = ["--gradient-sample", "0.8", "--hessian-sample", "30", "--max-iterations", 20]
    start = ["train", f"{HERE}:listed", "--optimizer", name, *samples, *OPTIONS[name]]
    return [*start, "--epochs", 3, "--steps-per-epoch", 3, "--quiet", "--json", *more]


@pytest.mark.parametrize("name", CLOSURE)
def test_resume_in_the_middle_of_an_epoch_continues_bit_for_bit(
    kronfac: Kronfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    outcome = kronfac(*run(name, "--out", straight))
    assert outcome.status == 0, outcome.err
    with monkeypatch.context() as patch:
        interrupt(patch, at=3 + 1 + 2)
        assert kronfac(*run(name, "--out", halves, "--save-every", 1)).message == "interrupted"
    torch.rand(7)  # whatever else the process draws
    assert read_checkpoint(halves / "checkpoint.pt")["loop"]["tally"]["updates"] == 2
    resumed = kronfac("train", "--resume", "--out", halves, "--quiet", "--json")
    assert resumed.status == 0, resumed.err
    first, second = read_checkpoint(straight / "checkpoint.pt"), read_checkpoint(halves / "checkpoint.pt")
    for content in (first, second):
        content["history"].pop("seconds")
    assert all(same(first[part], second[part]) for part in first)
    assert resumed.json["log"] == outcome.json["log"]
    assert len(resumed.json["log"]) == 9


def test_a_run_is_the_optimizer_in_a_plain_loop(kronfac: Kronfac, tmp_path: Path) -> None:
    outcome = kronfac(*run("trcg", "--out", tmp_path, "--seed", 4, "--chunk-size", 50))
    assert outcome.status == 0, outcome.err
    result = outcome.json
    problem = load_problem(f"{HERE}:listed", seed=4)
    inputs, targets = (torch.cat(side) for side in zip(*problem.train, strict=True))
    optimizer = TRCG(
        problem.model.parameters(),
        examples=90,
        gradient_sample=0.8,
        hessian_sample=30,
        ratio_sample="gradient",
        chunk_size=50,
        radius=2.0,
        radius_rule="classical",
        max_iterations=20,
        seed=4,
    )
    losses, spent = [], []
    for _ in range(3):
        for _ in range(3):
            optimizer.step(lambda i: F.cross_entropy(problem.model(inputs[i]), targets[i]))
        losses.append(optimizer.last_step.loss_after)  # type: ignore[union-attr]
        spent.append(optimizer.propagations)
        list(problem.test or ())  # a loader draws its base seed from the global stream
    saved = read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert all(torch.equal(value, saved[key]) for key, value in problem.model.state_dict().items())
    assert result["train_loss"] == losses
    assert result["propagations"] == spent
    assert result["updates"] == [3, 6, 9]
    assert result["batch_size"] == [72] * 3
    assert result["lr"] == [None] * 3


@pytest.mark.parametrize("name", CLOSURE)
def test_learns_the_digits_from_samples(kronfac: Kronfac, name: str) -> None:
    samples = ["--gradient-sample", 400, "--hessian-sample", 100, "--max-iterations", 10]
    outcome = kronfac("train", "--optimizer", name, *samples, "--epochs", 6, "--json")
    assert outcome.status == 0, outcome.err
    assert "epoch 6/6" in outcome.err
    result = outcome.json
    assert result["test_loss"][-1] < 0.75 * 2.3
    assert result["settings"]["hessian_sample"] == 100
    assert "batch_size" not in result["settings"]
    assert "lr" not in result["settings"]


def test_options_reach_the_optimizer() -> None:
    model = torch.nn.Linear(3, 2)
    settings = Settings("newton-minres", tolerance=0.25, ratio_sample=4, curvature="fisher")
    optimizer: Any = make_optimizer(settings, model, 0, 10)
    group = optimizer.param_groups[0]
    assert (group["tolerance"], group["line_search_sample"], optimizer.examples) == (0.25, 4, 10)
    assert optimizer.likelihood is not None
    optimizer = make_optimizer(Settings("gauss-newton-cg", damping=0.5), model, 0, 10)
    assert optimizer.state_dict()["kronfac"]["values"]["damping"] == 0.5
    optimizer = make_optimizer(Settings("cubic-newton", sigma=0.5), model, 0, 10)
    assert optimizer.state_dict()["kronfac"]["values"]["sigma"] == 0.5


def test_the_text_summary(kronfac: Kronfac) -> None:
    arguments = [part for part in run("newton-minres") if part != "--json"]
    outcome = kronfac(*arguments)
    assert outcome.status == 0
    assert outcome.out.splitlines()[0].endswith("newton-minres")
    assert "propagations" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "trcg", "--lr", "0.1"], "--lr applies to --optimizer kfac, ekfac, sgd"),
        (["--optimizer", "trcg", "--batch-size", "64"], "--batch-size does not apply to --optimizer trcg"),
        (["--optimizer", "trcg", "--schedule", "grow-batch"], "--optimizer trcg has neither; leave --schedule out"),
        (["--optimizer", "trcg", "--small-batch", "9"], "leave --decay-epochs and --small-batch out"),
        (["--optimizer", "trcg", "--gradient-sample", "few"], "--gradient-sample few: expected a number of examples"),
        (["--optimizer", "trcg", "--hessian-sample", "gradient"], "or all"),
        (["--optimizer", "trcg", "--hessian-sample", "1.5"], "hessian_sample"),
        (["--optimizer", "trcg", "--hessian-sample", "0"], "hessian_sample"),
        (["--optimizer", "trcg", "--hessian-sample", "1500"], "expected at most examples=1437, got 1500"),
        (["--optimizer", "trcg", "--radius", "30"], "radius: expected at most max_radius=20.0"),
        (["--optimizer", "trcg", "--likelihood", "gaussian"], "--likelihood applies with --curvature fisher only"),
        (["--optimizer", "trcg", "--sigma", "1"], "--sigma applies to --optimizer cubic-newton only, not to trcg"),
        (["--optimizer", "sgd", "--steps-per-epoch", "2"], "--steps-per-epoch applies to --optimizer trcg"),
        (["--optimizer", "gauss-newton-cg", "--damping", "inf"], "--damping: expected a finite number"),
    ],
)
def test_refusals(kronfac: Kronfac, arguments: list[str], message: str) -> None:
    outcome = kronfac("train", *arguments)
    assert outcome.status == 2
    assert message in outcome.message


def test_a_problem_whose_examples_are_not_known(kronfac: Kronfac) -> None:
    outcome = kronfac("train", f"{HERE}:own_generator", "--optimizer", "trcg")
    assert outcome.status == 2
    assert "--optimizer trcg picks its own examples, and" in outcome.message
    assert "brings a loader; return the training data as one batch" in outcome.message


def test_a_loss_that_is_not_finite_is_a_failed_run(kronfac: Kronfac) -> None:
    outcome = kronfac("train", f"{HERE}:infinite", "--optimizer", "trcg", "--quiet")
    assert outcome.status == 1
    assert "training failed in epoch 1" in outcome.message
