"""Iterate averaging: a running average of the parameters beside the parameters, for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac.optim import reading


@dataclass
class Averaged:
    """The average of one parameter.

    Attributes:
        value: on the parameter's device; float32 where the parameter is narrower, which would round 1 % of it away.
        count: how many iterates are in it.
    """

    value: Tensor
    count: int


class IterateAverage:
    """θ̄ ← d θ̄ + (1 - d) θ after every step, d = min(1 - 1/k, weight) at the k-th iterate of the parameter.

    Martens & Grosse, arXiv:1503.05671, average with weight 0.99; with the growing weight of the first steps the start
    point is not in the average.

    Args:
        weight: that is reached in the long run.

    Attributes:
        entries: by parameter.
        swapped: whether the parameters hold the averages now.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.entries: dict[Tensor, Averaged] = {}
        self.swapped = False

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], good: Tensor | None = None) -> None:
        """Take the parameters as they are now into their averages. No host synchronisation.

        Args:
            parameters: of the optimizer.
            good: bool (); where it is False the averages stay, of parameters that a skipped step has left alone. None
                for True.
        """
        due: dict[tuple[int, torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for parameter in parameters:
            entry = self.entries.get(parameter)
            if entry is None:
                value = parameter.detach().to(average_dtype(parameter), copy=True)
                self.entries[parameter] = Averaged(value, 1)
                continue
            entry.value = entry.value.to(parameter.device, average_dtype(parameter))
            entry.count += 1
            key = entry.count, parameter.device, parameter.dtype
            values, iterates = due.setdefault(key, ([], []))
            values.append(entry.value)
            iterates.append(parameter.detach().to(entry.value.dtype))
        for (count, _, _), (values, iterates) in due.items():
            decay = min(1 - 1 / count, self.weight)
            if good is None:
                torch._foreach_mul_(values, decay)
                torch._foreach_add_(values, iterates, alpha=1 - decay)
                continue
            weight = torch.full((), 1 - decay, dtype=values[0].dtype, device=values[0].device)
            moves = torch._foreach_sub(iterates, values)
            torch._foreach_mul_(moves, weight * reading.brought(good, weight.device, weight.dtype))
            torch._foreach_add_(values, moves)

    @contextmanager
    def swap(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Put the averages into the parameters inside, and the iterates back afterwards, bit for bit.

        Raises:
            RuntimeError: nested, or before the first step.
        """
        if self.swapped:
            raise RuntimeError("KFAC.averaged_parameters: expected not to be nested: the averages are in place already")
        if not self.entries:
            raise RuntimeError("KFAC.averaged_parameters: there is no average before the first step")
        known = [parameter for parameter in parameters if parameter in self.entries]
        kept = [parameter.detach().clone() for parameter in known]
        self.swapped = True
        try:
            with torch.no_grad():
                for parameter in known:
                    parameter.copy_(self.entries[parameter].value)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(known, kept, strict=True):
                    parameter.copy_(value)
            self.swapped = False

    def restore(self, parameters: Sequence[Tensor], entries: Mapping[int, Averaged]) -> None:
        """Replace all averages by those of a checkpoint, which knows parameters by their position."""
        self.entries = {parameters[index]: entry for index, entry in entries.items()}


def average_dtype(parameter: Tensor) -> torch.dtype:
    """In which type a parameter's average is kept."""
    narrow = parameter.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow else parameter.dtype
