"""`kronfac train --schedule`: the plain loop it stands for, its log, and resuming in the middle of a grown batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kronfac.cli import training_run
from kronfac.cli.checkpoint import read_checkpoint
from kronfac.cli.problems import load_problem
from tests.cli.conftest import Kronfac
from tests.cli.test_train import HERE, same

SCHEDULES = {
    "fixed": ["--decay-epochs", "1,2", "--decay", "0.5", "--small-batch", "10"],
    "linear-scaling": ["--base-batch-size", "8", "--warmup-epochs", "1.5", "--decay-epochs", "2"],
    "grow-batch": ["--decay-epochs", "1,2", "--decay", "0.5", "--max-batch-size", "40"],
    "adaptive-batch": ["--duration", "1", "--max-batch-size", "64", "--adversarial", "0.1", "--eigenvalue-every", "2"],
}
BATCHES = {
    "fixed": [16] * 4,
    "linear-scaling": [16] * 4,
    "grow-batch": [16, 32, 40, 40],
    "adaptive-batch": [16, 32, 64, 64],
}


def run(schedule: str, *more: Any) -> list[Any]:
    start = ["train", f"{HERE}:listed", "--batch-size", 16, "--epochs", 4, "--quiet", "--json"]
    return [*start, "--schedule", schedule, *SCHEDULES[schedule], *more]


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Press Ctrl-C after the checkpoint number `at`."""
    original, saves = training_run.save_checkpoint, []

    def interrupted(*arguments: Any) -> None:
        original(*arguments)
        saves.append(1)
        if len(saves) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "save_checkpoint", interrupted)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["nesterov", "kfac"])
def test_resume_in_the_middle_of_an_epoch_continues_bit_for_bit(
    kronfac: Kronfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, optimizer: str
) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    outcome = kronfac(*run(schedule, "--optimizer", optimizer, "--out", straight))
    assert outcome.status == 0, outcome.err
    assert outcome.json["batch_size"] == BATCHES[schedule]
    with monkeypatch.context() as patch:
        # The batch has grown by then: of 90 examples there are 6 steps of 16, 3 of 32 and a checkpoint at their end.
        interrupt(patch, at=6 + 1 + 2)
        arguments = ["--optimizer", optimizer, "--out", halves, "--save-every", 1]
        assert kronfac(*run(schedule, *arguments)).message == "interrupted"
    torch.rand(7)  # whatever else the process draws
    saved = read_checkpoint(halves / "checkpoint.pt")
    assert (saved["epoch"], saved["loop"]["tally"]["updates"]) == (1, 2)
    assert saved["loop"]["schedule"]["batch_size"] == BATCHES[schedule][1]
    resumed = kronfac("train", "--resume", "--out", halves, "--quiet", "--json")
    assert resumed.status == 0, resumed.err
    assert (resumed.json["resumed_from_epoch"], resumed.json["epochs"]) == (1, 4)
    assert resumed.json["log"] == outcome.json["log"]
    first, second = read_checkpoint(straight / "checkpoint.pt"), read_checkpoint(halves / "checkpoint.pt")
    for content in (first, second):
        content["history"].pop("seconds")
    assert all(same(first[name], second[name]) for name in first)


def test_a_scheduled_run_is_the_plain_loop_that_the_schedule_documents(kronfac: Kronfac, tmp_path: Path) -> None:
    from torch.nn import functional as F

    from kronfac.schedules import GrowBatch

    arguments = ["--optimizer", "nadam", "--small-batch", 12, "--seed", 2, "--out", tmp_path]
    result = kronfac(*run("grow-batch", *arguments)).json
    problem = load_problem(f"{HERE}:listed", seed=2)
    inputs, targets = (torch.cat(side) for side in zip(*problem.train, strict=True))
    optimizer = torch.optim.NAdam(problem.model.parameters(), lr=0.003)
    schedule = GrowBatch(
        optimizer,
        examples=90,
        batch_size=16,
        max_batch_size=40,
        epochs=4,
        decay_epochs=[1, 2],
        decay=0.5,
        small_batch=12,
        seed=2,
    )
    while not schedule.finished:
        for step in schedule.steps():
            optimizer.zero_grad()
            for part in step.parts:
                (part.weight * F.cross_entropy(problem.model(inputs[part.indices]), targets[part.indices])).backward()
            optimizer.step()
        schedule.end_epoch()
        list(problem.test or ())  # a loader draws its base seed from the global stream
    saved = read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert all(torch.equal(value, saved[key]) for key, value in problem.model.state_dict().items())
    assert result["log"] == schedule.log
    assert result["updates"] == [row["updates"] for row in schedule.log] == [6, 9, 12, 15]
    assert result["propagations"] == [90, 180, 270, 360]
    assert result["lr"] == [0.003, 0.003, pytest.approx(0.003 * 40 / 64), pytest.approx(0.003 * 40 / 64)]


def test_a_schedule_without_a_rule_is_the_problems_own_loader(kronfac: Kronfac, tmp_path: Path) -> None:
    """Batches of the built-in datasets come in the order of the schedules."""
    run = ["train", "--optimizer", "sgd", "--epochs", 2, "--batch-size", 256, "--quiet", "--json", "--out"]
    plain = kronfac(*run, tmp_path / "plain").json
    scheduled = kronfac(*run, tmp_path / "scheduled", "--small-batch", 256).json
    assert plain["log"] == []
    assert [row["reason"] for row in scheduled["log"]] == ["unchanged", "end"]
    for name in ("train_loss", "test_loss", "updates", "propagations", "batch_size", "lr"):
        assert plain[name] == scheduled[name]


def test_adaptive_batch_counts_what_it_spends_and_says_what_it_decided(kronfac: Kronfac) -> None:
    arguments = ["--eigenvalue-examples", 50, "--eigenvalue-blocks", "layers", "--adversarial-share", 0.5]
    outcome = kronfac(*run("adaptive-batch", *arguments))
    assert outcome.status == 0, outcome.err
    result = outcome.json
    spent = [row["products"] or 0 for row in result["log"]]
    # The first epoch's small batches have 8, 8, ... and of the last 10 examples 5 perturbed ones; half as many then.
    perturbed = [5 * 8 + 5, 5 * 4 + 2]
    assert [row["omega"] for row in result["log"]] == [0.5, 0.25, 0.0, 0.0]
    steps = [90 + 2 * 50 * products for products in spent]
    expected = [steps[0] + perturbed[0], steps[1] + perturbed[1], steps[2], steps[3]]
    assert result["propagations"] == [sum(expected[: epoch + 1]) for epoch in range(4)]
    assert spent[1] > 0
    assert result["settings"]["eigenvalue_blocks"] == "layers"
    text = kronfac(*[part for part in run("adaptive-batch") if part != "--json"]).out
    assert "adaptive-batch" in text.splitlines()[0]
    assert "duration" in text
    assert "next batch" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "abs"], "--schedule abs: expected fixed, linear-scaling, grow-batch, adaptive-batch"),
        (["--warmup-epochs", "2"], "--warmup-epochs applies to --schedule linear-scaling only, not to fixed"),
        (["--max-batch-size", "64"], "--max-batch-size applies to --schedule grow-batch or adaptive-batch only"),
        (["--schedule", "grow-batch", "--adversarial", "0.1"], "applies to --schedule adaptive-batch only"),
        (["--schedule", "grow-batch", "--max-batch-size", "2000"], "max_batch_size: expected batch_size=128 to"),
        (["--schedule", "grow-batch", "--decay-epochs", "10,five"], "--decay-epochs 10,five: expected whole numbers"),
        (["--schedule", "grow-batch", "--decay-epochs", "25"], "expected ascending epochs from 1 to 19, got [25]"),
        (["--decay-epochs", "5", "--decay", "1.5"], "decay"),
        (["--decay", "0.5"], "--decay is applied at the --decay-epochs"),
        (["--schedule", "linear-scaling", "--epochs", "3"], "warmup_epochs: expected at most epochs=3"),
        (["--schedule", "adaptive-batch", "--adversarial", "nan"], "--adversarial: expected a finite number"),
        (["--schedule", "adaptive-batch", "--adversarial-share", "0.5"], "--adversarial-share is that of"),
        (["--schedule", "adaptive-batch", "--eigenvalue-tolerance", "0"], "tolerance"),
        (["--save-every", "5", "--out", "run"], "--save-every needs a schedule"),
        (["--schedule", "grow-batch", "--save-every", "5"], "--save-every needs --out"),
        (["--batch-size", "5000", "--small-batch", "64"], "batch_size: expected at most the number of examples, 1437"),
    ],
)
def test_refusals(
    kronfac: Kronfac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = kronfac("train", *arguments)
    assert outcome.status == 2
    assert message in outcome.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("own_generator", "--schedule picks its own examples, and"),
        ("triples", "batches are not made of"),
        ("ragged", "differ in shape"),
    ],
)
def test_a_problem_whose_examples_are_not_known(kronfac: Kronfac, function: str, message: str) -> None:
    outcome = kronfac("train", f"{HERE}:{function}", "--optimizer", "sgd", "--schedule", "grow-batch")
    assert outcome.status == 2
    assert message in outcome.message


def test_divergence_under_a_schedule_is_a_failed_run(kronfac: Kronfac, tmp_path: Path) -> None:
    arguments = ["--optimizer", "sgd", "--lr", 3e38, "--save-every", 1, "--out", tmp_path]
    outcome = kronfac(*run("grow-batch", *arguments))
    assert outcome.status == 1
    assert "training diverged in epoch 1" in outcome.message
    if (tmp_path / "checkpoint.pt").exists():  # from before the update that did it
        assert read_checkpoint(tmp_path / "checkpoint.pt")["loop"]["tally"]["updates"] > 0


@pytest.mark.parametrize("damage", ["tally", "schedule", "missing"])
def test_resume_refuses_the_state_of_something_else(kronfac: Kronfac, tmp_path: Path, damage: str) -> None:
    arguments = ["--optimizer", "sgd", "--out", tmp_path]
    assert kronfac(*run("grow-batch", *arguments)).status == 0
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    if damage == "tally":
        saved["loop"]["tally"]["loss"] = "small"
    elif damage == "schedule":
        saved["loop"]["schedule"]["options"]["max_batch_size"] = 41
    else:
        del saved["loop"]
    torch.save(saved, path)
    outcome = kronfac("train", "--resume", "--quiet", "--out", tmp_path)
    assert outcome.status == 2
    assert "checkpoint.pt: does not fit the run" in outcome.message


def test_resume_refuses_another_schedule(kronfac: Kronfac, tmp_path: Path) -> None:
    arguments = ["--optimizer", "sgd", "--out", tmp_path]
    assert kronfac(*run("grow-batch", *arguments)).status == 0
    resume = ["train", "--resume", "--out", tmp_path]
    for option, value, shown, saved in (
        ("--schedule", "fixed", "fixed", "grow-batch"),
        ("--max-batch-size", 80, "80", "40"),
        ("--decay-epochs", "1", "[1]", "[1, 2]"),
    ):
        message = kronfac(*resume, option, value).message
        assert message == f"--resume: {option} {shown} differs from the checkpoint's {saved}"
