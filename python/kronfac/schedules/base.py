"""What all batch schedules share: the order of the examples, steps of several small batches, rates, log and state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from kronfac._permutation import permutation
from kronfac.optim.options import integer
from kronfac.schedules import state
from kronfac.schedules.feeding import PartSampler, open_loader
from kronfac.schedules.parts import Fed, Part, Step, cut_step, pieces
from kronfac.schedules.rates import LearningRates, check_factor, exact

Row: TypeAlias = "dict[str, int | float | str | bool | None]"
"""A row of a schedule's log."""


class BatchSchedule(ABC):
    """Hands out the examples of each epoch in steps of a batch size, and sets the learning rates to go with it.

        while not schedule.finished:
            for step in schedule.steps():
                optimizer.zero_grad()
                for part in step.parts:
                    x, y = inputs[part.indices], targets[part.indices]
                    (part.weight * loss_fn(model(x), y)).backward()
                optimizer.step()
            schedule.end_epoch()

    Every example is in exactly one step of each epoch, in an order that depends on the seed and the epoch alone (that
    of `kronfac.datasets.Batches` with the same seed). The last step of an epoch has what is left; nothing is carried
    into the next. A step of more than `small_batch` examples comes in several parts, whose gradients add up. The loss
    must be a mean over examples.

    A step counts as taken when it is handed out: save between `optimizer.step()` and the next step, or between epochs.

    Args: of the subclasses; `reference` is the batch size that the base learning rates belong to.

    Attributes:
        examples: of an epoch.
        epochs: in all.
        epoch: that is going on, 0-based.
        updates: steps handed out so far.
        batch_size: examples of a step in this epoch.
        small_batch: the most examples of a part.
        log: a dict per epoch, see `end_epoch`.
    """

    name: ClassVar[str] = ""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        examples: int,
        batch_size: int,
        epochs: int,
        decay_epochs: Sequence[int],
        decay: float,
        small_batch: int | None,
        seed: int,
        reference: int,
    ) -> None:
        where = f"{self.name}:"
        self.examples = integer(f"{where} examples", examples)
        self.epochs = integer(f"{where} epochs", epochs)
        self.batch_size = check_batch(f"{where} batch_size", batch_size, self.examples)
        self.small_batch = self.batch_size if small_batch is None else integer(f"{where} small_batch", small_batch)
        self.decay_epochs = _check_epochs(f"{where} decay_epochs", decay_epochs, self.epochs)
        self.decay = check_factor(f"{where} decay", decay)
        self.seed = integer(f"{where} seed", seed, low=0)
        self._first_batch, self._reference = self.batch_size, reference
        self._rates = LearningRates(optimizer, self.name)
        self.epoch = self.updates = self._position = 0
        self.log: list[Row] = []
        self._reader = 0  # of the iterators over steps only the last one made may go on
        self._exhausted = False

    # ------------------------------------------------------------------ what differs between schedules

    @abstractmethod
    def _batch_at(self, epoch: int) -> int:
        """The batch size of an epoch, as far as it is known without measuring."""

    def _scale(self) -> float:
        """Learning rate over its base value at the next step."""
        return float(Fraction(self.batch_size, self._reference) * self._decayed(self.epoch))

    def _decide(self, epoch: int) -> tuple[int, Row, list[str]]:
        """What changes for the next epoch.

        Returns:
            Its batch size, columns of the log, and reasons.
        """
        return self._batch_at(epoch), {}, ["decay"] if epoch in self.decay_epochs else []

    def _options(self) -> dict[str, Any]:
        """The options that a checkpoint must agree in, as plain data."""
        return {
            "examples": self.examples,
            "batch_size": self._first_batch,
            "small_batch": self.small_batch,
            "decay_epochs": list(self.decay_epochs),
            "decay": self.decay,
            "seed": self.seed,
        }

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _check_own_state(self, loaded: state.Loaded) -> Callable[[], None]:
        """Check a subclass's part of a checkpoint, and its batch size; returns what puts it in place."""
        expected = self._batch_at(loaded.epoch)
        if loaded.batch_size != expected:
            raise ValueError(
                f"{self.name}.load_state_dict: batch_size: expected {expected} in epoch {loaded.epoch}, "
                f"got {loaded.batch_size}"
            )
        return lambda: None

    # ------------------------------------------------------------------ reading

    @property
    def finished(self) -> bool:
        """Whether all epochs are over."""
        return self.epoch >= self.epochs

    @property
    def accumulation(self) -> int:
        """Small batches of a full step in this epoch."""
        return math.ceil(self.batch_size / self.small_batch)

    @property
    def position(self) -> int:
        """Examples of this epoch that were handed out."""
        return self._position

    @property
    def steps_per_epoch(self) -> int:
        """Steps of this epoch in all, at its batch size."""
        return math.ceil(self.examples / self.batch_size)

    @property
    def lr_scale(self) -> float:
        """What the base learning rates are multiplied by at the next step."""
        return self._scale()

    @property
    def omega(self) -> float:
        """Share of each small batch that is perturbed in this epoch."""
        return 0.0

    @property
    def batch_sampler(self) -> PartSampler:
        """For torch's DataLoader: the small batches that are left of this epoch, each a list of indices.

        Weights and the borders of steps come from `steps(loader)`.
        """
        return PartSampler(self._parts_left, self._count_left)

    def steps(self, loader: DataLoader[Any] | None = None) -> Iterator[Step]:
        """The rest of the current epoch: all of it, or what a checkpoint from its middle left.

        Args:
            loader: a DataLoader with this schedule's `batch_sampler`; `part.batch` is then what it yields. Workers may
                read ahead: what counts as handed out are the steps, not what the loader has read.

        Returns:
            The steps. Of each, all parts must be read where there is a loader.

        Raises:
            TypeError, ValueError: a loader with another batch sampler.
            RuntimeError: all epochs are over; the epoch is over and `end_epoch` was not called. While iterating: the
                learning rates were changed by something else, another iteration was begun, parts were not read.
        """
        where = f"{self.name}.steps"
        if self.finished:
            raise RuntimeError(f"{where}: all {self.epochs} epochs are over")
        if self._exhausted:
            raise RuntimeError(f"{where}: epoch {self.epoch} is over; call end_epoch() first")
        if loader is not None:
            self._check_loader(loader)
        self._reader += 1
        return self._read(self._reader, loader)

    def _read(self, reader: int, loader: DataLoader[Any] | None) -> Iterator[Step]:
        where = f"{self.name}.steps"
        order, batches = self._order(), None
        while self._position < self.examples:
            self._rates.check()
            self._rates.scale(self._scale())
            indices = order[self._position : self._position + self.batch_size]
            parts: Any = cut_step(indices, self.small_batch, self.omega)
            if loader is not None:
                if batches is None:
                    batches = open_loader(loader, self.seed, self.updates)
                parts = Fed(parts, batches, where)
            step = Step(parts, self._position // self.batch_size, self.updates, len(indices))
            self._position += step.examples
            self.updates += 1
            yield step
            if reader != self._reader:
                raise RuntimeError(
                    f"{where}: the epoch or the state was changed, or other steps() were begun, during the loop"
                )
            if isinstance(parts, Fed) and parts.unread:
                raise RuntimeError(f"{where}: {parts.unread} of {len(parts)} parts of a step were not read")
        self._exhausted = True

    def adversarial(
        self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Tensor, y: Tensor, part: Part
    ) -> Tensor:
        """The inputs of a part with its leading `part.adversarial` examples perturbed; `x` itself where there are none.

        Args:
            model: in the mode it trains in.
            loss_fn: called as loss_fn(output, targets).
            x: inputs of the part's examples (n, ...).
            y: their targets (n, ...).
            part: of this schedule.

        Raises:
            RuntimeError: perturbed examples are asked for, and this schedule has no attack.
        """
        if part.adversarial:
            raise RuntimeError(f"{self.name}.adversarial: the part is of a schedule with an attack, this one has none")
        return x

    # ------------------------------------------------------------------ deciding

    def end_epoch(self) -> Row:
        """Close the epoch: decide batch size and learning rates of the next one.

        Returns:
            The row that was appended to `log`, plain numbers and strings: `epoch` (that ended), `updates` (so far), its
            `batch_size`, `accumulation`, `lr` (at its last step; of the first param group) and `lr_scale` (over the
            base value), `omega`; `eigenvalue`, `residual`, `converged`, `products`, `reference`, `timer` (None where
            there are none); `next_batch_size`, `next_lr` (of the next epoch's first step), `next_omega`; `reason`, of
            what changes.

        Raises:
            RuntimeError: steps of the epoch were not taken; all epochs are over; something else changed the rates.
        """
        where = f"{self.name}.end_epoch"
        if self.finished:
            raise RuntimeError(f"{where}: all {self.epochs} epochs are over")
        if self._position < self.examples:
            raise RuntimeError(
                f"{where}: {self.examples - self._position} of {self.examples} examples of epoch {self.epoch} were not "
                "handed out; go through steps() first"
            )
        self._rates.check()
        row: Row = {
            "epoch": self.epoch,
            "updates": self.updates,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "lr": self._rates.values[0],
            "lr_scale": self._rates.factor,
            "omega": self.omega,
        }
        row.update(dict.fromkeys(("eigenvalue", "residual", "converged", "products", "reference", "timer")))
        batch_size, columns, reasons = self._decide(self.epoch + 1)
        row.update(columns)
        self.epoch += 1
        self.batch_size, self._position, self._exhausted = batch_size, 0, False
        self._reader += 1
        if self.finished:
            reasons = [reason for reason in reasons if reason != "decay"] + ["end"]
        else:
            self._rates.scale(self._scale())
        row["next_batch_size"] = None if self.finished else self.batch_size
        row["next_lr"] = None if self.finished else self._rates.values[0]
        row["next_omega"] = None if self.finished else self.omega
        row["reason"] = ", ".join(reasons) or "unchanged"
        self.log.append(row)
        return row

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit, as plain data (``torch.load(weights_only=True)``).

        The order of the examples follows from seed and epoch. Save it with the states of model and optimizer, and with
        torch's random stream where the model or the attack draws from it.
        """
        return {
            "format": state.FORMAT,
            "schedule": self.name,
            "options": self._options(),
            "epoch": self.epoch,
            "position": self._position,
            "updates": self.updates,
            "batch_size": self.batch_size,
            "base_lrs": list(self._rates.base),
            "lrs": list(self._rates.values),
            "lr_scale": self._rates.factor,
            "log": [dict(row) for row in self.log],
            "own": self._own_state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, also one from the middle of an epoch; it is checked whole before it is used.

        The options must be those of the checkpoint, except `epochs`, with which a run can be extended, and the
        callables. The optimizer's learning rates become the checkpoint's.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: what does not fit, by its path in the checkpoint; the schedule is then as it was.
        """
        loaded = state.check(
            state_dict,
            name=self.name,
            options=self._options(),
            epochs=self.epochs,
            groups=len(self._rates.base),
        )
        restore = self._check_own_state(loaded)
        restore()
        self.epoch, self.updates = loaded.epoch, loaded.updates
        self._position, self.batch_size = loaded.position, loaded.batch_size
        self._rates.restore(loaded.base_lrs, loaded.lrs, loaded.lr_scale)
        self.log = loaded.log
        self._reader += 1
        self._exhausted = False

    # ------------------------------------------------------------------ parts of the above

    def _decayed(self, epoch: int) -> Fraction:
        """Decay to the power of the number of decay epochs up to this one."""
        return exact(self.decay) ** sum(decay_epoch <= epoch for decay_epoch in self.decay_epochs)

    def _order(self) -> Tensor:
        return permutation(self.examples, self.seed, self.epoch)

    def _parts_left(self) -> Iterator[list[int]]:
        """Small batches from the present position on, wherever the schedule is when they are read."""
        if self.finished:
            return iter(())
        steps = pieces(self._order()[self._position :], self.batch_size)
        return (piece.tolist() for indices in steps for piece in pieces(indices, self.small_batch))

    def _count_left(self) -> int:
        steps, rest = divmod(self.examples - self._position, self.batch_size)
        return 0 if self.finished else steps * self.accumulation + math.ceil(rest / self.small_batch)

    def _check_loader(self, loader: object) -> None:
        where = f"{self.name}.steps: loader"
        if not isinstance(loader, DataLoader):
            raise TypeError(f"{where}: expected a torch.utils.data.DataLoader, got {type(loader).__name__}")
        sampler = loader.batch_sampler
        if not isinstance(sampler, PartSampler) or not sampler.belongs_to(self._parts_left):
            raise ValueError(f"{where}: make it with batch_sampler=schedule.batch_sampler of this schedule")

    def __repr__(self) -> str:
        """The epoch, and what it has."""
        return (
            f"{self.name}(epoch {self.epoch} of {self.epochs}, batch_size={self.batch_size}, "
            f"small_batch={self.small_batch}, lr_scale={self.lr_scale:g})"
        )


def check_batch(where: str, value: object, examples: int) -> int:
    """Return a batch size, which must not exceed the number of examples.

    Raises:
        TypeError, ValueError: it is no integer of 1 to `examples`.
    """
    result = integer(where, value)
    if result > examples:
        raise ValueError(f"{where}: expected at most the number of examples, {examples}, got {result}")
    return result


def _check_epochs(where: str, value: object, epochs: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{where}: expected a list of epochs, got {value!r}")
    result = tuple(integer(where, epoch) for epoch in value)
    if list(result) != sorted(set(result)) or (result and result[-1] >= epochs):
        raise ValueError(f"{where}: expected ascending epochs from 1 to {epochs - 1}, got {list(value)}")
    return result
