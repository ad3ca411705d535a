"""The processes that share the data of an operator, and the sums over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed


class Ranks:
    """The ranks of a process group; without one, this process alone, for which everything here does nothing.

    Args:
        group: True for the default process group if one is up, False for this process alone, or a process group.
        device: of the tensors that are sent.
        caller: the public function that error messages name.

    Attributes:
        size: number of ranks.

    Raises:
        TypeError: `group` is neither a bool nor a process group.
        ValueError: a process group that this process does not belong to.
    """

    def __init__(self, group: Any, device: torch.device, caller: str) -> None:
        self._group: Any = None
        self._device = device
        self._caller = caller
        self.size, self._rank = 1, 0
        available = distributed.is_available()
        if isinstance(group, bool):
            if not (group and available and distributed.is_initialized()):
                return
        elif available and group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{caller}: distributed: this process is no member of the given process group")
        elif available and isinstance(group, distributed.ProcessGroup):
            self._group = group
        else:
            raise TypeError(
                f"{caller}: distributed: expected True, False or a torch.distributed process group, got {group!r}"
            )
        self.size, self._rank = distributed.get_world_size(self._group), distributed.get_rank(self._group)
        if self._rank < 0:
            raise ValueError(f"{caller}: distributed: this process is no member of the given process group")

    def total(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.size == 1:
            return value
        return sum(self._gathered(value))

    def before(self, count: int) -> int:
        """The sum of a number over the ranks before this one."""
        return int(sum(self._gathered(float(count))[: self._rank])) if self.size > 1 else 0

    def sum_(self, tensor: Tensor) -> None:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            self._reduce(tensor, distributed.ReduceOp.SUM)

    @contextmanager
    def together(self, same: Mapping[str, int] | None = None) -> Iterator[None]:
        """Let all ranks finish the block or none: an error of one is an error of all, so that nobody waits in vain.

        Args:
            same: what must be equal on all ranks, by its name.

        Raises:
            RuntimeError: another rank failed.
            ValueError: something differs between the ranks.
        """
        if self.size == 1:
            yield
            return
        named = dict(same or {})
        try:
            yield
        except BaseException:
            self._vote(named, failed=True)
            raise
        self._vote(named, failed=False)

    def _vote(self, named: Mapping[str, int], *, failed: bool) -> None:
        values = list(named.values())
        # One reduction: the largest of x and of -x are equal and opposite only where all x are the same.
        votes = torch.tensor([int(failed), *values, *(-value for value in values)], dtype=torch.int64)
        votes = votes.to(self._device)
        self._reduce(votes, distributed.ReduceOp.MAX)
        anyone, *largest = votes.tolist()
        if failed:
            return
        if anyone:
            raise RuntimeError(f"{self._caller}: another rank of the process group failed; its own error says why")
        different = [
            name
            for name, high, low in zip(named, largest[: len(values)], largest[len(values) :], strict=True)
            if high != -low
        ]
        if different:
            raise ValueError(
                f"{self._caller}: {', '.join(different)}: not the same on all ranks of the process group, over which "
                "products are summed; give every rank the same model, vectors (equal seeds, thread counts and kinds "
                "of processor) and options, and each its own data, or pass distributed=False to analyse them apart"
            )

    def _reduce(self, tensor: Tensor, how: Any) -> None:
        try:
            distributed.all_reduce(tensor, how, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._caller}: the ranks of the process group could not be brought together: "
                f"{str(error).splitlines()[0]}. Every rank must make the same calls, also where one alone uses the "
                f"result, with a backend for {tensor.device.type} tensors; distributed=False analyses the data of "
                "this process alone"
            ) from error

    def _gathered(self, value: float) -> list[float]:
        values = torch.zeros(self.size, dtype=torch.float64, device=self._device)
        values[self._rank] = value
        self._reduce(values, distributed.ReduceOp.SUM)
        return [float(entry) for entry in values.tolist()]


def bits(*tensors: Tensor) -> int:
    """A sum over the bits of tensors, one pass over memory: equal for equal tensors, hardly ever for others."""
    if not tensors:
        return 0
    sums = []
    for tensor in tensors:
        tensor = tensor.detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        # Onto one device, so that the host waits once.
        sums.append(tensor.contiguous().view(width).sum(dtype=torch.int64).to(tensors[0].device))
    total = sum(place * found for place, found in enumerate(torch.stack(sums).tolist(), start=1))
    # Below 2⁶¹, so that the number and its negative are both 64-bit integers.
    return int(total % 2**61)
