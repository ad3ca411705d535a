"""Schedules whose batch size stays the same: the baseline, and linear scaling with warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch.optim import Optimizer

from kronfac.optim.options import integer, number
from kronfac.schedules.base import BatchSchedule, Row
from kronfac.schedules.rates import exact


class FixedBatch(BatchSchedule):
    """The baseline (BL): a fixed batch size and the base learning rate, which decays at given epochs.

    Args:
        optimizer: any torch optimizer with learning rates, whose present values are the base values of their groups.
        examples: of an epoch, >= 1.
        batch_size: examples of a step, at most `examples`.
        epochs: in all, >= 1.
        decay_epochs: 0-based epochs before which the learning rate is multiplied by `decay`, ascending, 1 to
            epochs - 1.
        decay: factor in (0, 1).
        small_batch: the most examples of a forward and backward; larger steps accumulate. None: those of the first
            step.
        seed: of the order of the examples.

    Raises:
        TypeError: an option of the wrong type; not a torch optimizer.
        ValueError: an option out of range; an optimizer without learning rates.
    """

    name = "FixedBatch"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        examples: int,
        batch_size: int = 128,
        epochs: int,
        decay_epochs: Sequence[int] = (),
        decay: float = 0.2,
        small_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimizer,
            examples=examples,
            batch_size=batch_size,
            epochs=epochs,
            decay_epochs=decay_epochs,
            decay=decay,
            small_batch=small_batch,
            seed=seed,
            reference=batch_size,
        )
        self._rates.scale(self._scale())

    def _batch_at(self, epoch: int) -> int:
        return self._first_batch


class LinearScaling(BatchSchedule):
    """Linear scaling with warm-up (FB; Goyal et al., arXiv:1706.02677): lr = base · B/B0 for a fixed batch size B.

    In the warm-up the rate grows by the same amount at every step, from the base rate at the first step of the run to
    base · B/B0 after `warmup_epochs`. Step decay as in `FixedBatch` multiplies what the warm-up gives. Momentum is not
    corrected for the changes of the rate (remark 3 there): torch's form of momentum does not hold the rate, so that the
    buffer is in the gradient's units and needs none.

    Args:
        optimizer: as in `FixedBatch`; its rates belong to batches of `base_batch_size`.
        examples: of an epoch, >= 1.
        batch_size: B, at most `examples`.
        base_batch_size: B0, that the base learning rates are meant for.
        epochs: in all, >= 1.
        warmup_epochs: how long the warm-up takes, 0 to `epochs`; a fraction counts in steps, rounded.
        decay_epochs: as in `FixedBatch`.
        decay: as in `FixedBatch`.
        small_batch: as in `FixedBatch`.
        seed: of the order of the examples.

    Raises:
        TypeError, ValueError: as in `FixedBatch`.
    """

    name = "LinearScaling"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        examples: int,
        batch_size: int,
        base_batch_size: int = 128,
        epochs: int,
        warmup_epochs: float = 5,
        decay_epochs: Sequence[int] = (),
        decay: float = 0.2,
        small_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimizer,
            examples=examples,
            batch_size=batch_size,
            epochs=epochs,
            decay_epochs=decay_epochs,
            decay=decay,
            small_batch=small_batch,
            seed=seed,
            reference=integer("LinearScaling: base_batch_size", base_batch_size),
        )
        self.base_batch_size = self._reference
        self.warmup_epochs = number("LinearScaling: warmup_epochs", warmup_epochs)
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"LinearScaling: warmup_epochs: expected at most epochs={self.epochs}, or the full rate is never "
                f"reached, got {warmup_epochs!r}"
            )
        self.warmup_steps = round(self.warmup_epochs * self.steps_per_epoch)
        self._rates.scale(self._scale())

    def _batch_at(self, epoch: int) -> int:
        return self._first_batch

    def _scale(self) -> float:
        full = Fraction(self.batch_size, self._reference)
        if self.updates < self.warmup_steps:
            full = 1 + (full - 1) * Fraction(self.updates, self.warmup_steps)
        return float(full * self._decayed(self.epoch))

    def _decide(self, epoch: int) -> tuple[int, Row, list[str]]:
        batch_size, columns, reasons = super()._decide(epoch)
        if self.updates < self.warmup_steps:
            reasons.insert(0, "warm-up")
        return batch_size, columns, reasons

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "base_batch_size": self._reference, "warmup_epochs": self.warmup_epochs}


class GrowBatch(BatchSchedule):
    """Grow the batch instead of decaying the learning rate (GG; Smith et al., arXiv:1711.00489).

    Before each decay epoch the batch becomes 1/decay times as large as long as it fits `max_batch_size`, and the
    learning rate is kept; beyond that the rate decays. Where the product is no integer, or only a part of it fits, the
    batch takes what it can and the rate the rest: lr/B after k decay epochs is base/B0 · decay^k.

    Args:
        optimizer: as in `FixedBatch`.
        examples: of an epoch, >= 1.
        batch_size: B0, of the first epoch.
        max_batch_size: the largest batch, `batch_size` to `examples`.
        epochs: in all, >= 1.
        decay_epochs: 0-based epochs before which lr/B decays, ascending, 1 to epochs - 1.
        decay: factor in (0, 1).
        small_batch: as in `FixedBatch`.
        seed: of the order of the examples.

    Raises:
        TypeError, ValueError: as in `FixedBatch`.
    """

    name = "GrowBatch"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        examples: int,
        batch_size: int = 128,
        max_batch_size: int,
        epochs: int,
        decay_epochs: Sequence[int] = (),
        decay: float = 0.2,
        small_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimizer,
            examples=examples,
            batch_size=batch_size,
            epochs=epochs,
            decay_epochs=decay_epochs,
            decay=decay,
            small_batch=small_batch,
            seed=seed,
            reference=batch_size,
        )
        self.max_batch_size = check_largest(self.name, max_batch_size, self.batch_size, self.examples)
        self._rates.scale(self._scale())

    def _batch_at(self, epoch: int) -> int:
        return min(self.max_batch_size, int(self._first_batch / self._decayed(epoch)))

    def _decide(self, epoch: int) -> tuple[int, Row, list[str]]:
        batch_size, columns, reasons = super()._decide(epoch)
        if "decay" in reasons:
            asked = self.batch_size / exact(self.decay)
            grown, rest = batch_size > self.batch_size, batch_size < int(asked)
            reasons = ["growth"] * grown + ["decay"] * (rest or not grown)
        return batch_size, columns, reasons

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "max_batch_size": self.max_batch_size}


def check_largest(name: str, value: object, batch_size: int, examples: int) -> int:
    """Return the largest batch size of a schedule that grows.

    Raises:
        TypeError, ValueError: it is no integer from `batch_size` to `examples`.
    """
    result = integer(f"{name}: max_batch_size", value)
    if not batch_size <= result <= examples:
        raise ValueError(
            f"{name}: max_batch_size: expected batch_size={batch_size} to the number of examples, {examples}, "
            f"got {result}"
        )
    return result
