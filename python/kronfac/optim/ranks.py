"""The ranks of a process group, and what they decide together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kronfac.optim import reading

Flag: TypeAlias = "Tensor | bool"
"""A verdict: a bool tensor () that nobody has waited for yet, or what is known already because it lay on the CPU."""


def world_size() -> int:
    """Ranks in the default process group, 1 without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def rank() -> int:
    """Rank of this process in the default process group, 0 without one."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def agree(flags: Sequence[Flag], home: torch.device) -> bool:
    """Whether all flags are true, on every rank: none runs ahead. Waits for the device."""
    return bool(verdict(flags, home))


def verdict(flags: Sequence[Flag], home: torch.device) -> Flag:
    """The same without waiting: a bool where nothing has to be waited for, else a bool tensor () on `home`."""
    known = all(flag for flag in flags if isinstance(flag, bool))
    waiting = [flag for flag in flags if not isinstance(flag, bool)]
    alone = world_size() == 1
    if alone and not (known and waiting):
        return known
    if not waiting:
        waiting.append(torch.full((), known, device=home))
    whole = torch.stack([reading.brought(flag, home) for flag in waiting]).all()
    if not alone:
        whole = whole & known
        votes = whole.to(torch.int32)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
        whole = votes != 0
    return bool(whole) if reading.at_hand(whole) else whole
