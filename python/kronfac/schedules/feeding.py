"""A schedule's small batches for torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


class PartSampler(Sampler[list[int]]):
    """Yields the small batches that are left of a schedule's current epoch; made by `schedule.batch_sampler`.

    Iterating changes nothing in the schedule: a DataLoader with workers reads ahead.
    """

    def __init__(self, left: Callable[[], Iterator[list[int]]], count: Callable[[], int]) -> None:
        self._left, self._count = left, count

    def belongs_to(self, left: Callable[[], Iterator[list[int]]]) -> bool:
        """Whether it reads from this method of a schedule."""
        return self._left == left

    def __iter__(self) -> Iterator[list[int]]:
        return self._left()

    def __len__(self) -> int:
        return self._count()


def open_loader(loader: DataLoader[Any], seed: int, update: int) -> Iterator[Any]:
    """Begin to read a loader without moving the global random stream.

    A loader without a generator of its own draws the seed of its workers from the global stream whenever it is begun,
    also after a resume in the middle of an epoch, when the uninterrupted run draws nothing. Here that seed follows from
    the schedule's seed and the number of updates.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed((seed % (1 << 31)) * (1 << 31) + update)
        return iter(loader)
