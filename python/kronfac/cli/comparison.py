"""SGD against K-FAC on equal terms: the same network, initialisations and batches, each at the best of its own grid.

Protocol. Every setting of a grid is trained from every seed, and judged by the median over the seeds of the loss on the
whole training set after the last epoch; a run that diverges counts as infinite. Training loss and not accuracy, because
that is what an optimizer is asked to lower. The reported curves are those of the chosen settings' own runs. Where SGD's
best rate lies at an end of its grid, the grid is extended there until it does not; K-FAC's grid is never larger.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kronfac.cli.errors import RunError
from kronfac.cli.optimizers import Settings, make_optimizer
from kronfac.cli.problems import Problem, builtin_problem, set_epoch
from kronfac.cli.training import evaluate, train_epoch
from kronfac.datasets import Dataset

SGD_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Three decades, two to two and a half apart."""

KFAC_RATES = (0.03, 0.1, 0.3)
KFAC_DAMPINGS = (0.01, 0.03)
KFAC_KL_CLIP = 1e-4
"""Fixed, like the momentum of both. Momentum 0.9 adds up ten steps, so that they stay within a divergence of 1e-2."""

BATCH_SIZE = 64
MAX_EXTENSIONS = 4


@dataclass
class Run:
    """One training run. Lists have one entry per epoch completed; losses are over the whole split.

    Attributes:
        settings: the optimizer.
        seed: of the initialisation and the batch order.
        initial_train_loss: before the first step.
        train_loss: on the training split.
        test_loss: on the test split.
        test_accuracy: on the test split, a fraction.
        seconds_at_epoch: seconds of training until the end of each epoch, without the evaluations.
        steps: optimizer steps taken.
        diverged: whether the loss stopped being finite; the lists then end early.
        state: the final parameters.
    """

    settings: Settings
    seed: int
    initial_train_loss: float
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds_at_epoch: list[float] = field(default_factory=list)
    steps: int = 0
    diverged: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def final_loss(self) -> float:
        """Training loss after the last epoch, infinite for a diverged run."""
        return math.inf if self.diverged else self.train_loss[-1]

    def as_dict(self) -> dict[str, Any]:
        """What report.json holds of a run."""
        return {
            **self.settings.used(),
            "seed": self.seed,
            "epochs": len(self.train_loss),
            "steps": self.steps,
            "diverged": self.diverged,
            "initial_train_loss": self.initial_train_loss,
            "train_loss": self.train_loss,
            "test_loss": self.test_loss,
            "test_accuracy": self.test_accuracy,
            "seconds": self.seconds_at_epoch[-1] if self.seconds_at_epoch else 0.0,
            "seconds_at_epoch": self.seconds_at_epoch,
        }


@dataclass(frozen=True)
class Candidate:
    """One setting of a grid with its runs, one per seed."""

    settings: Settings
    runs: list[Run]

    @property
    def median_final_loss(self) -> float:
        """What settings are chosen by."""
        return statistics.median(run.final_loss for run in self.runs)

    @property
    def representative(self) -> Run:
        """The run whose final loss is the median (the lower one of two)."""
        return sorted(self.runs, key=lambda run: run.final_loss)[(len(self.runs) - 1) // 2]

    def median_curve(self, values: Callable[[Run], Sequence[float]]) -> list[float]:
        """Median over the seeds at each epoch that all seeds completed."""
        return [statistics.median(column) for column in zip(*(values(run) for run in self.runs), strict=False)]

    def as_dict(self) -> dict[str, Any]:
        """What report.json holds of a setting."""
        return {
            **self.settings.used(),
            "final_train_loss": [run.final_loss for run in self.runs],
            "median_final_train_loss": self.median_final_loss,
            "diverged": sum(run.diverged for run in self.runs),
        }


def sgd_grid() -> list[Settings]:
    """The settings tried for SGD, in ascending order of the rate."""
    return [Settings("sgd", lr) for lr in SGD_RATES]


def kfac_grid() -> list[Settings]:
    """The settings tried for K-FAC."""
    return [
        Settings("kfac", lr, damping=damping, kl_clip=KFAC_KL_CLIP) for damping in KFAC_DAMPINGS for lr in KFAC_RATES
    ]


def run_settings(
    data: Dataset,
    settings: Settings,
    seed: int,
    epochs: int,
    batch_size: int = BATCH_SIZE,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Train once. Initialisation and batches depend on the seed alone, so that all settings share them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        problem = builtin_problem(data, batch_size=batch_size, seed=seed)
        optimizer = make_optimizer(settings, problem.model, seed)
        assert problem.test is not None
        assert problem.ordered is not None
        run = Run(settings, seed, evaluate(problem.model, problem.loss_fn, problem.ordered)[0])
        seconds = 0.0
        for epoch in range(epochs):
            set_epoch(problem.train, epoch)
            trained = train_epoch(problem.model, problem.loss_fn, problem.train, optimizer, on_step)
            seconds += trained.seconds
            run.steps += trained.updates
            train_loss, _ = evaluate(problem.model, problem.loss_fn, problem.ordered)
            if not (math.isfinite(trained.loss) and math.isfinite(train_loss)):
                run.diverged = True
                break
            test_loss, accuracy = evaluate(problem.model, problem.loss_fn, problem.test)
            run.train_loss.append(train_loss)
            run.test_loss.append(test_loss)
            run.test_accuracy.append(accuracy or 0.0)
            run.seconds_at_epoch.append(seconds)
        run.state = {name: value.detach().clone() for name, value in problem.model.state_dict().items()}
    return run


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest median final loss; the first of equals.

    Raises:
        RunError: all diverged.
    """
    winner = min(candidates, key=lambda candidate: candidate.median_final_loss)
    if not math.isfinite(winner.median_final_loss):
        raise RunError(f"every setting tried for {winner.settings.optimizer} diverged")
    return winner


def search_rates(
    settings: Iterable[Settings],
    try_out: Callable[[Settings], Candidate],
    max_extensions: int = MAX_EXTENSIONS,
) -> list[Candidate]:
    """Try a grid over the rate alone, and go on beyond the end at which the best lies.

    Returns:
        All candidates in ascending order of the rate.
    """
    found = [try_out(one) for one in settings]
    for _ in range(max_extensions):
        winner = best(found)
        if winner is found[0]:
            found.insert(0, try_out(Settings(winner.settings.optimizer, winner.settings.lr / 2)))
        elif winner is found[-1]:
            found.append(try_out(Settings(winner.settings.optimizer, winner.settings.lr * 2)))
        else:
            break
    return found


def at_edge(candidates: Sequence[Candidate]) -> bool:
    """Whether the best of candidates in ascending order of the rate is the first or the last."""
    winner = best(candidates)
    return winner is candidates[0] or winner is candidates[-1]


def compare(sgd: Candidate, kfac: Candidate) -> dict[str, Any]:
    """After how many epochs, and seconds, K-FAC's median training loss is at or below SGD's final one."""
    target = sgd.median_final_loss
    sgd_seconds = sgd.median_curve(lambda run: run.seconds_at_epoch)
    kfac_seconds = kfac.median_curve(lambda run: run.seconds_at_epoch)
    curve = kfac.median_curve(lambda run: run.train_loss)
    epochs = len(sgd.median_curve(lambda run: run.train_loss))
    reached = next((epoch for epoch, loss in enumerate(curve, start=1) if loss <= target), None)
    return {
        "epochs": epochs,
        "sgd_final_train_loss": target,
        "kfac_final_train_loss": kfac.median_final_loss,
        "kfac_epochs_to_sgd_final_loss": reached,
        "epoch_ratio": None if reached is None else reached / epochs,
        "kfac_seconds_to_sgd_final_loss": None if reached is None else kfac_seconds[reached - 1],
        "sgd_seconds": sgd_seconds[-1],
        "kfac_seconds": kfac_seconds[-1],
        "seconds_ratio": None if reached is None else kfac_seconds[reached - 1] / sgd_seconds[-1],
        "sgd_test_accuracy": statistics.median(run.test_accuracy[-1] for run in sgd.runs if run.test_accuracy),
        "kfac_test_accuracy": statistics.median(run.test_accuracy[-1] for run in kfac.runs if run.test_accuracy),
    }


def final_problem(data: Dataset, run: Run) -> Problem:
    """The trained network of a run with its data."""
    with torch.random.fork_rng(devices=[]):
        problem = builtin_problem(data, batch_size=BATCH_SIZE, seed=run.seed)
    problem.model.load_state_dict(run.state)
    return problem
