"""Batches of a split held in memory, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kronfac._permutation import permutation
from kronfac.datasets.dataset import Split


class Batches:
    """Iterable of (inputs, targets), every example once; the last batch may be smaller.

    With a seed the order is a new permutation each epoch, a function of (seed, epoch): two optimizers see the same
    batches, and a run that continues at epoch n sees what an uninterrupted one would have seen. The global random
    stream is untouched.

    Args:
        split: the examples.
        batch_size: examples per batch.
        seed: None keeps the order of the split.
        device: where the batches are moved to.
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration (the name that torch's DistributedSampler uses)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.split.inputs, self.split.targets
        order: Tensor | None = None
        if self.seed is not None:
            order = permutation(len(self.split), self.seed, self.epoch)
        for start in range(0, len(self.split), self.batch_size):
            part = slice(start, start + self.batch_size)
            index = part if order is None else order[part]
            yield inputs[index].to(self.device), targets[index].to(self.device)
