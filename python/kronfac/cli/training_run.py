"""A run of `kronfac train`: the problem, what trains it, its history, and the checkpoint of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kronfac.cli.checkpoint import load_parameters, random_state, restore_random_state, save_checkpoint
from kronfac.cli.errors import RunError, UsageError, one_line
from kronfac.cli.examples import single_examples
from kronfac.cli.loops import ClosureLoop, LoaderLoop, Loop, ScheduleLoop
from kronfac.cli.optimizers import OPTIMIZERS, Settings, make_optimizer
from kronfac.cli.output import Progress, make_directory, to_json, write_atomically
from kronfac.cli.problems import load_problem
from kronfac.cli.schedules import SCHEDULES, is_scheduled, make_schedule
from kronfac.cli.train_options import CHECKPOINT, HISTORY
from kronfac.cli.training import Epoch, evaluate

_COLUMNS = ("train_loss", "test_loss", "test_accuracy", "seconds")
_LATER_COLUMNS = ("lr", "batch_size", "updates", "propagations")  # which earlier checkpoints lack


class TrainingRun:
    """A run, new until `load`.

    Args:
        config: as made by `kronfac.cli.train_config`.
        given: what of it the user typed.
        data_dir: directory of the dataset's files.
        device: torch device.
        out: directory for the checkpoint and the history, or None.
        save_every: updates between checkpoints within an epoch; None for none.

    Raises:
        UsageError: a problem, an option or data that will not do.
    """

    def __init__(
        self,
        config: dict[str, Any],
        given: Any,
        *,
        data_dir: Path | None,
        device: str,
        out: Path | None,
        save_every: int | None = None,
    ) -> None:
        self.config, self.out, self._save_every = config, out, save_every
        self.problem = load_problem(
            config["problem"], data_dir=data_dir, batch_size=config["batch_size"], seed=config["seed"], device=device
        )
        self.settings = self._settings("likelihood" in given)
        self.optimizer, self.loop = self._parts()
        if save_every is not None and not (self.loop.saves_within and out is not None):
            lacking = "--out" if out is None else "a schedule; the position of a loader within an epoch cannot be saved"
            raise UsageError(f"--save-every needs {lacking}")
        self.history: dict[str, list[Any]] = {name: [] for name in (*_COLUMNS, *_LATER_COLUMNS)}
        self.resumed_from: int | None = None

    def _settings(self, likelihood_given: bool) -> Settings:
        options = {name: self.config[name] for name in OPTIMIZERS[self.config["optimizer"]].options}
        if "kl_clip" in options:
            options["kl_clip"] = options["kl_clip"] or None
        if "likelihood" in options and ":" in self.problem.name and self.problem.likelihood is not None:
            if likelihood_given:
                name = self.problem.name
                raise UsageError(f"--likelihood: {name} says itself what its likelihood is; leave the option out")
            options["likelihood"] = self.problem.likelihood
        return Settings(self.config["optimizer"], **options)

    def _parts(self) -> tuple[torch.optim.Optimizer, Loop]:
        """The optimizer, and what feeds it."""
        config, problem, name = self.config, self.problem, self.config["optimizer"]
        if OPTIMIZERS[name].closure:
            data = single_examples(problem, f"--optimizer {name}")
            newton: Any = make_optimizer(self.settings, problem.model, config["seed"], len(data[1]))
            return newton, ClosureLoop(problem, newton, data, config["steps_per_epoch"])
        optimizer = make_optimizer(self.settings, problem.model, config["seed"])
        if not is_scheduled(config):
            return optimizer, LoaderLoop(problem, optimizer)
        data = single_examples(problem, "--schedule")
        schedule = make_schedule(config, optimizer, problem, data)
        return optimizer, ScheduleLoop(problem, optimizer, schedule, data, config.get("eigenvalue_examples", 0))

    @property
    def done(self) -> int:
        """Epochs completed."""
        return len(self.history["train_loss"])

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue from what `kronfac.cli.checkpoint.read_checkpoint` has read.

        Raises:
            UsageError: it does not fit.
        """
        path = (self.out or Path()) / CHECKPOINT
        load_parameters(self.problem.model, checkpoint["model"], path)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: does not fit the optimizer ({one_line(error)})") from None
        try:
            self.loop.load_state_dict(checkpoint.get("loop", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: does not fit the run ({one_line(error)})") from None
        epochs, history = checkpoint["epoch"], dict(checkpoint["history"])
        for name in _LATER_COLUMNS:
            history.setdefault(name, [None] * epochs)
        if any(len(history.get(name, ())) != epochs for name in self.history):
            raise UsageError(f"{path}: damaged checkpoint, its history does not have {epochs} epochs")
        self.history = {name: list(history[name]) for name in self.history}
        self.resumed_from = epochs
        restore_random_state(checkpoint["random"], self.problem.train, self.problem.test)

    def train(self, *, quiet: bool = False) -> dict[str, Any]:
        """Train until all epochs are complete, with a checkpoint after each; returns `result`.

        Raises:
            RunError: training diverged.
        """
        problem, epochs = self.problem, self.config["epochs"]
        if self.out is not None:
            make_directory(self.out)
        work = self.loop.work
        total = None if work is None else work * max(epochs - self.done, 0)
        accuracy_note = ""
        updates = 0
        with Progress(total, problem.name, unit=self.loop.unit, quiet=quiet) as progress:

            def on_step(loss: float, amount: int) -> None:
                nonlocal updates
                progress.note(f"loss {loss:.3g}{accuracy_note}")
                progress.advance(amount)
                updates += 1
                if self.out is not None and self._save_every is not None and updates % self._save_every == 0:
                    self._save(self.out)

            while self.done < epochs:
                progress.label(f"epoch {self.done + 1}/{epochs}")
                trained = self.loop.run(self.done, on_step)
                self._check_finite(trained)
                self._record(trained)
                if self.out is not None:
                    self._save(self.out)
                    write_atomically(self.out / HISTORY, to_json(self.result()) + "\n")
                accuracy = self.history["test_accuracy"][-1]
                accuracy_note = "" if accuracy is None else f", test accuracy {accuracy:.2%}"
        return self.result()

    def _check_finite(self, trained: Epoch) -> None:
        if abs(trained.loss) < float("inf"):
            return
        kept = f"; {self.out / CHECKPOINT} holds epoch {self.done}" if self.out is not None and self.done > 0 else ""
        remedy = "lower --lr or raise --damping" if self.settings.damping is not None else "lower --lr"
        raise RunError(
            f"training diverged in epoch {self.done + 1} (a batch's loss is {trained.loss}) "
            f"with lr {self.config['lr']:g}; {remedy}{kept}"
        )

    def _record(self, trained: Epoch) -> None:
        problem, before = self.problem, self.history
        test_loss, accuracy = (None, None)
        if problem.test is not None:
            test_loss, accuracy = evaluate(problem.model, problem.loss_fn, problem.test)
        row = {
            "train_loss": trained.loss,
            "test_loss": test_loss,
            "test_accuracy": accuracy,
            "seconds": trained.seconds,
            "lr": trained.lr,
            "batch_size": trained.batch_size,
            "updates": _sum(before["updates"], trained.updates),
            "propagations": _sum(before["propagations"], trained.propagations),
        }
        for name, column in self.history.items():
            column.append(row[name])

    def _save(self, out: Path) -> None:
        content = {
            "config": self.config,
            "epoch": self.done,
            "model": self.problem.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "loop": self.loop.state_dict(),
            "random": random_state(self.problem.train, self.problem.test),
        }
        save_checkpoint(out / CHECKPOINT, content)

    def result(self) -> dict[str, Any]:
        """What the command prints with --json."""
        config = self.config
        schedule: dict[str, Any] = {"schedule": config["schedule"]}
        if is_scheduled(config):
            schedule |= {name: config[name] for name in SCHEDULES[config["schedule"]].options}
        if not OPTIMIZERS[config["optimizer"]].closure:
            schedule["batch_size"] = config["batch_size"]
        return {
            "problem": self.problem.name,
            "parameters": self.problem.parameters,
            "settings": self.settings.used() | schedule | {"seed": config["seed"]},
            "epochs": self.done,
            "skipped_steps": getattr(self.optimizer, "skipped_steps", 0),
            "resumed_from_epoch": self.resumed_from,
            **self.history,
            "log": self.loop.log,
            "checkpoint": None if self.out is None else str(self.out / CHECKPOINT),
        }


def _sum(column: list[int | None], more: int) -> int | None:
    """The next cumulative entry; unknown after unknown ones."""
    last = column[-1] if column else 0
    return None if last is None else last + more


def summary(result: dict[str, Any]) -> str:
    """What the command prints without --json."""
    settings = result["settings"]
    rate = f" with lr {settings['lr']:g}" if "lr" in settings else ""
    schedule = f", {settings['schedule']}" if settings["schedule"] != "fixed" else ""
    lines = [
        f"{result['problem']}, {result['parameters']:,} parameters, {settings['optimizer']}{rate}{schedule}",
        "epoch  train loss   test loss  test accuracy  batch   updates  seconds",
    ]
    columns = ("train_loss", "test_loss", "test_accuracy", "batch_size", "updates", "seconds")
    rows = zip(*(result[name] for name in columns), strict=True)
    for epoch, (train_loss, test_loss, accuracy, batch, updates, seconds) in enumerate(rows, start=1):
        test = f"{'-':>10}" if test_loss is None else f"{test_loss:10.4g}"
        correct = f"{'-':>13}" if accuracy is None else f"{accuracy:13.2%}"
        counts = f"{'-' if batch is None else batch:>5}  {'-' if updates is None else updates:>8}"
        lines.append(f"{epoch:5d}  {train_loss:10.4g}  {test}  {correct}  {counts}  {seconds:7.2f}")
    if settings["schedule"] == "adaptive-batch":
        lines += _decisions(result["log"])
    if result["propagations"] and result["propagations"][-1] is not None:
        lines.append(f"{result['propagations'][-1]:,} propagations")
    if result["skipped_steps"]:
        lines.append(f"{result['skipped_steps']} steps were skipped because something in them was not finite")
    if result["checkpoint"] is not None:
        lines.append(f"checkpoint: {result['checkpoint']}")
    return "\n".join(lines)


def _decisions(log: list[dict[str, Any]]) -> list[str]:
    """What an adaptive schedule measured and why it changed."""
    lines = ["epoch  eigenvalue  next batch   next lr  why"]
    for row in log:
        value = f"{'-':>10}" if row["eigenvalue"] is None else f"{row['eigenvalue']:10.4g}"
        following = f"{'-':>10}  {'-':>8}"
        if row["next_batch_size"] is not None:
            following = f"{row['next_batch_size']:10d}  {row['next_lr']:8.3g}"
        lines.append(f"{row['epoch'] + 1:5d}  {value}  {following}  {row['reason']}")
    return lines
