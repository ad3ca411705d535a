"""The learning rates of an optimizer, which a schedule scales from their base values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor
from torch.optim import Optimizer

from kronfac.optim.options import number


class LearningRates:
    """Sets the learning rate of every param group to its base value times a factor.

    Args:
        optimizer: whose rates at this moment are the base values.
        caller: the public function that error messages name.

    Attributes:
        base: learning rate of each group before any scaling.
        values: that were set last.
        factor: of the last scaling.

    Raises:
        TypeError: not a torch optimizer.
        ValueError: an optimizer without learning rates, or one that chooses them.
    """

    def __init__(self, optimizer: Optimizer, caller: str) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{caller}: optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._optimizer, self._caller = optimizer, caller
        chosen = getattr(optimizer, "adaptation", None) is not None
        self.base: list[float] = []
        for index, group in enumerate(optimizer.param_groups):
            if chosen or group.get("lr") is None:
                raise ValueError(
                    f"{caller}: optimizer: param group {index}: expected a learning rate to scale; "
                    f"{type(optimizer).__name__} has none, or chooses it at every step"
                )
            value = group["lr"]
            self.base.append(number(f"{caller}: optimizer: param group {index}: lr", _plain(value)))
        self.values = list(self.base)
        self.factor = 1.0

    def check(self) -> None:
        """Check that the rates are those that were set last; tensors are not read, the device would be waited for.

        Raises:
            RuntimeError: something else changed them, or added a param group.
        """
        groups = self._optimizer.param_groups
        if len(groups) != len(self.values):
            raise RuntimeError(
                f"{self._caller}: optimizer: expected {len(self.values)} param groups, got {len(groups)}; "
                "make the schedule after all groups were added"
            )
        for index, (group, wanted) in enumerate(zip(groups, self.values, strict=True)):
            if not isinstance(group["lr"], Tensor) and group["lr"] != wanted:
                raise RuntimeError(
                    f"{self._caller}: optimizer: the lr of param group {index} was set to {wanted} and is now "
                    f"{group['lr']}; leave the learning rate to the schedule: no other scheduler, and load the states "
                    "of optimizer and schedule together"
                )

    def scale(self, factor: float) -> None:
        """Set every rate to its base value times a factor."""
        self.factor = factor
        self._put([base * factor for base in self.base])

    def restore(self, base: Sequence[float], values: Sequence[float], factor: float) -> None:
        """Take up what a checkpoint says."""
        self.base, self.factor = list(base), factor
        self._put(values)

    def _put(self, values: Sequence[float]) -> None:
        for group, value in zip(self._optimizer.param_groups, values, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        self.values = list(values)


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def exact(value: float) -> Fraction:
    """The fraction with a small denominator that a float stands for (0.2 is 1/5), or the float itself.

    With it 128 · 5 · 0.2 is 128, so that a rate that is to be kept is kept to the last bit.
    """
    simple = Fraction(value).limit_denominator(10**6)
    return simple if float(simple) == value else Fraction(value)


def check_factor(where: str, value: object) -> float:
    """Return a factor below one that rates decay by.

    Raises:
        TypeError, ValueError: not a number, or not in (0, 1).
    """
    result = number(where, value, high=1.0, open_low=True)
    if not math.isfinite(1.0 / result):
        raise ValueError(f"{where}: expected a factor whose inverse is finite, got {value!r}")
    return result
