"""How an epoch is trained: over the problem's own loader, what a schedule hands out, or by steps with a closure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kronfac.cli.errors import RunError, one_line
from kronfac.cli.output import plain
from kronfac.cli.problems import Problem, set_epoch
from kronfac.cli.training import Epoch, current_lr, train_epoch

if TYPE_CHECKING:
    from kronfac.optim.newton import NewtonOptimizer
    from kronfac.schedules import BatchSchedule

OnStep: TypeAlias = Callable[[float, int], None]
"""Called after every update with the loss and how much work it was, in the units of `Loop.work`."""


class Loop(Protocol):
    """Trains one epoch after the other.

    Attributes:
        unit: that work is counted in, "step" or "example".
        work: of an epoch in these units; None where that is not known.
        log: a row per decision of a schedule, or per step; empty where there are neither.
        saves_within: whether its state can be saved between two updates of an epoch, too.
    """

    unit: str
    saves_within: bool

    @property
    def work(self) -> int | None: ...

    @property
    def log(self) -> list[dict[str, Any]]: ...

    def run(self, epoch: int, on_step: OnStep) -> Epoch:
        """Train the epoch `epoch`, or what is left of it after `load_state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """What a continuation needs beside model and optimizer, as plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: it does not fit.
        """


class LoaderLoop:
    """Batches as the problem's loader gives them, an update for each."""

    unit = "step"
    saves_within = False

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer) -> None:
        self._problem, self._optimizer = problem, optimizer
        self.log: list[dict[str, Any]] = []

    @property
    def work(self) -> int | None:
        """Batches of an epoch."""
        return len(self._problem.train) if isinstance(self._problem.train, Sized) else None

    def run(self, epoch: int, on_step: OnStep) -> Epoch:
        """Go through the loader once."""
        problem = self._problem
        set_epoch(problem.train, epoch)
        return train_epoch(
            problem.model, problem.loss_fn, problem.train, self._optimizer, lambda loss: on_step(loss, 1)
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: loaders have their generators, which are saved with the other random streams."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


@dataclass
class Tally:
    """What an epoch has been so far.

    Attributes:
        loss: sum over the examples, or the last one.
        examples: of all updates.
        updates: optimizer steps.
        propagations: examples of which a gradient was taken, each time it was; a product with the Hessian counts twice.
        batch_size: the most examples of an update.
        seconds: of all this.
    """

    loss: float = 0.0
    examples: int = 0
    updates: int = 0
    propagations: int = 0
    batch_size: int = 0
    seconds: float = 0.0

    @classmethod
    def load(cls, state: object) -> Tally:
        """Take up what `asdict` gave.

        Raises:
            ValueError: it is something else.
        """
        kinds = {field.name: float if field.name in ("loss", "seconds") else int for field in fields(cls)}
        if not isinstance(state, Mapping) or any(type(state.get(name)) is not kind for name, kind in kinds.items()):
            raise ValueError(f"tally: expected numbers for {', '.join(kinds)}, got {state!r:.80}")
        return cls(**{name: state[name] for name in kinds})


class ScheduleLoop:
    """Steps of the size that a schedule decides on, each in the parts that it asks for.

    Args:
        problem: what is trained.
        optimizer: of its parameters.
        schedule: of the optimizer.
        data: the training examples on the model's device, inputs and targets.
        eigenvalue_examples: that a product of the schedule's eigenvalue computation goes over.
    """

    unit = "example"
    saves_within = True

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        schedule: BatchSchedule,
        data: tuple[Tensor, Tensor],
        eigenvalue_examples: int = 0,
    ) -> None:
        self._problem, self._optimizer, self._schedule, self._data = problem, optimizer, schedule, data
        self._eigenvalue_examples = min(eigenvalue_examples, len(data[1]))
        self._tally = Tally()

    @property
    def work(self) -> int | None:
        """Examples of an epoch."""
        return self._schedule.examples

    @property
    def log(self) -> list[dict[str, Any]]:
        """The schedule's."""
        return self._schedule.log

    def run(self, epoch: int, on_step: OnStep) -> Epoch:
        """Train what is left of the schedule's epoch, and let it decide on the next one."""
        self._problem.model.train()
        tally, optimizer = self._tally, self._optimizer
        start = time.perf_counter()
        for step in self._schedule.steps():
            optimizer.zero_grad()
            loss = sum(self._part(part) for part in step.parts)
            optimizer.step()
            tally.loss += loss * step.examples
            tally.examples += step.examples
            tally.updates += 1
            tally.batch_size = max(tally.batch_size, step.examples)
            tally.seconds += time.perf_counter() - start
            if not abs(loss) < float("inf"):
                return self._finished(loss, current_lr(optimizer))
            on_step(loss, step.examples)
            start = time.perf_counter()
        row = self._schedule.end_epoch()
        tally.propagations += 2 * int(row["products"] or 0) * self._eigenvalue_examples
        tally.seconds += time.perf_counter() - start
        return self._finished(tally.loss / tally.examples, float(row["lr"] or 0.0))

    def _part(self, part: Any) -> float:
        """Back-propagate a part of a step; its contribution to the step's mean loss."""
        problem = self._problem
        x, y = (tensor[part.indices] for tensor in self._data)
        x = self._schedule.adversarial(problem.model, problem.loss_fn, x, y, part)
        loss = part.weight * problem.loss_fn(problem.model(x), y)
        loss.backward()
        self._tally.propagations += len(y) + part.adversarial
        return float(loss.item())

    def _finished(self, loss: float, lr: float | None) -> Epoch:
        tally, self._tally = self._tally, Tally()
        return Epoch(loss, tally.updates, tally.propagations, tally.batch_size, tally.seconds, lr)

    def state_dict(self) -> dict[str, Any]:
        """The schedule, and the epoch so far."""
        return {"schedule": self._schedule.state_dict(), "tally": asdict(self._tally)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, also in the middle of an epoch.

        Raises:
            ValueError: the state is not of such a schedule.
        """
        tally = Tally.load(state.get("tally"))
        self._schedule.load_state_dict(state.get("schedule", {}))
        self._tally = tally


class ClosureLoop:
    """Steps of an optimizer that evaluates the loss on examples of its own choice; an epoch is a number of steps.

    The epoch's loss is the optimizer's estimate of the loss after its last step.

    Args:
        problem: what is trained.
        optimizer: of its parameters, over as many examples as there are.
        data: the training examples on the model's device, inputs and targets.
        steps: of an epoch.
    """

    unit = "step"
    saves_within = True

    def __init__(self, problem: Problem, optimizer: NewtonOptimizer, data: tuple[Tensor, Tensor], steps: int) -> None:
        self._problem, self._optimizer, self._data, self._steps = problem, optimizer, data, steps
        self._tally = Tally()
        self.log: list[dict[str, Any]] = []

    @property
    def work(self) -> int | None:
        """Steps of an epoch."""
        return self._steps

    def run(self, epoch: int, on_step: OnStep) -> Epoch:
        """Make the steps that are left of the epoch.

        Raises:
            RunError: a loss or derivative that is not finite; the parameters are those before that step.
        """
        self._problem.model.train()
        tally, optimizer = self._tally, self._optimizer
        while tally.updates < self._steps:
            start = time.perf_counter()
            before = optimizer.propagations
            try:
                optimizer.step(self._evaluate)
            except ValueError as error:
                raise RunError(f"training failed in epoch {epoch + 1}: {one_line(error)}") from None
            record = optimizer.last_step
            assert record is not None
            self.log.append(plain(asdict(record)))
            tally.loss = float(record.loss_after)
            tally.updates += 1
            tally.propagations += optimizer.propagations - before
            tally.batch_size = max(tally.batch_size, record.gradient_examples)
            tally.seconds += time.perf_counter() - start
            on_step(tally.loss, 1)
        self._tally = Tally()
        return Epoch(tally.loss, tally.updates, tally.propagations, tally.batch_size, tally.seconds)

    def _evaluate(self, indices: Tensor | None) -> tuple[Tensor, Any]:
        inputs, targets = self._data if indices is None else (tensor[indices] for tensor in self._data)
        outputs = self._problem.model(inputs)
        return self._problem.loss_fn(outputs, targets), outputs

    def state_dict(self) -> dict[str, Any]:
        """The steps so far."""
        return {"log": self.log, "tally": asdict(self._tally)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, also in the middle of an epoch.

        Raises:
            ValueError: the state is not of such a loop.
        """
        tally, log = Tally.load(state.get("tally")), state.get("log")
        if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
            raise ValueError(f"log: expected a list of rows, got {type(log).__name__}")
        self._tally, self.log = tally, list(log)
