"""The order of the examples in an epoch."""

from __future__ import annotations

import torch
from torch import Tensor


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation that depends on the seed and the epoch alone; the global random stream is untouched.

    A run that continues in the middle of an epoch so needs neither the permutation nor the state of a generator.

    Args:
        count: of the examples.
        seed: >= 0.
        epoch: 0-based, below 2³¹.

    Returns:
        Indices (count,), int64, on the CPU.
    """
    # Any injective mix of the two numbers will do: the generator scrambles its seed.
    generator = torch.Generator().manual_seed((seed % (1 << 31)) * (1 << 31) + epoch)
    return torch.randperm(count, generator=generator)
