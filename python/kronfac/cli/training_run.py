"""A run of `kronfac train`: the problem, what trains it, its history, and the checkpoint of all of them."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from kronfac.cli.checkpoint import load_parameters, random_state, restore_random_state, save_checkpoint
from kronfac.cli.errors import RunError, UsageError, one_line
from kronfac.cli.optimizers import OPTIMIZERS, Settings, make_optimizer
from kronfac.cli.output import Progress, make_directory, to_json, write_atomically
from kronfac.cli.problems import load_problem, set_epoch
from kronfac.cli.train_options import CHECKPOINT, HISTORY
from kronfac.cli.training import Epoch, evaluate, train_epoch

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

    Raises:
        UsageError: a problem, an option or data that will not do.
    """

    def __init__(
        self, config: dict[str, Any], given: Any, *, data_dir: Path | None, device: str, out: Path | None
    ) -> None:
        self.config, self.out = config, out
        self.problem = load_problem(
            config["problem"], data_dir=data_dir, batch_size=config["batch_size"], seed=config["seed"], device=device
        )
        self.settings = self._settings("likelihood" in given)
        self.optimizer = make_optimizer(self.settings, self.problem.model, config["seed"])
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
        steps = len(problem.train) if isinstance(problem.train, Sized) else None
        total = None if steps is None else steps * max(epochs - self.done, 0)
        accuracy_note = ""
        with Progress(total, problem.name, quiet=quiet) as progress:

            def on_step(loss: float) -> None:
                progress.note(f"loss {loss:.3g}{accuracy_note}")
                progress.advance()

            while self.done < epochs:
                progress.label(f"epoch {self.done + 1}/{epochs}")
                set_epoch(problem.train, self.done)
                trained = train_epoch(problem.model, problem.loss_fn, problem.train, self.optimizer, on_step)
                self._check_finite(trained)
                self._record(trained)
                if self.out is not None:
                    self._save(self.out)
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
            f"with lr {self.settings.lr:g}; {remedy}{kept}"
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
            "lr": self.settings.lr,
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
            "random": random_state(self.problem.train, self.problem.test),
        }
        save_checkpoint(out / CHECKPOINT, content)
        write_atomically(out / HISTORY, to_json(self.result()) + "\n")

    def result(self) -> dict[str, Any]:
        """What the command prints with --json."""
        return {
            "problem": self.problem.name,
            "parameters": self.problem.parameters,
            "settings": self.settings.used() | {"batch_size": self.config["batch_size"], "seed": self.config["seed"]},
            "epochs": self.done,
            "skipped_steps": getattr(self.optimizer, "skipped_steps", 0),
            "resumed_from_epoch": self.resumed_from,
            **self.history,
            "checkpoint": None if self.out is None else str(self.out / CHECKPOINT),
        }


def _sum(column: list[int | None], more: int) -> int | None:
    """The next cumulative entry; unknown after unknown ones."""
    last = column[-1] if column else 0
    return None if last is None else last + more


def summary(result: dict[str, Any]) -> str:
    """What the command prints without --json."""
    settings = result["settings"]
    lines = [
        f"{result['problem']}, {result['parameters']:,} parameters, {settings['optimizer']} with lr {settings['lr']:g}",
        "epoch  train loss   test loss  test accuracy  batch   updates  seconds",
    ]
    columns = ("train_loss", "test_loss", "test_accuracy", "batch_size", "updates", "seconds")
    rows = zip(*(result[name] for name in columns), strict=True)
    for epoch, (train_loss, test_loss, accuracy, batch, updates, seconds) in enumerate(rows, start=1):
        test = f"{'-':>10}" if test_loss is None else f"{test_loss:10.4g}"
        correct = f"{'-':>13}" if accuracy is None else f"{accuracy:13.2%}"
        counts = f"{'-' if batch is None else batch:>5}  {'-' if updates is None else updates:>8}"
        lines.append(f"{epoch:5d}  {train_loss:10.4g}  {test}  {correct}  {counts}  {seconds:7.2f}")
    if result["skipped_steps"]:
        lines.append(f"{result['skipped_steps']} steps were skipped because something in them was not finite")
    if result["checkpoint"] is not None:
        lines.append(f"checkpoint: {result['checkpoint']}")
    return "\n".join(lines)
