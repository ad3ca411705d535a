"""What a mask selects. On an accelerator the host has to wait to learn how much that is: once for each mask."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# By mask: its version, the positions that are True, and which examples have any. They live as long as the mask does.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def chosen(x: Tensor, mask: Tensor) -> Tensor:
    """``x[mask]``: the entries of x, whose leading dimensions are the mask's, where it is True."""
    if _at_hand(mask):
        return x[mask]
    return x.flatten(0, mask.dim() - 1).index_select(0, _look_up(mask)[1])


def number(mask: Tensor) -> int:
    """How many entries are True."""
    return int(mask.sum()) if _at_hand(mask) else len(_look_up(mask)[1])


def of_examples(mask: Tensor) -> Tensor:
    """Which examples, those of the first dimension, have anything left, (examples,)."""
    if _at_hand(mask):
        return mask.reshape(len(mask), -1).any(1)
    left = _look_up(mask)[2]
    return mask if left is None else left


def _at_hand(mask: Tensor) -> bool:
    return mask.is_cpu


def _look_up(mask: Tensor) -> tuple[int, Tensor, Tensor | None]:
    entry: tuple[int, Tensor, Tensor | None] | None = _known.get(mask)  # type: ignore[no-untyped-call]
    if entry is None or entry[0] != mask._version:
        left = None if mask.dim() == 1 else mask.reshape(len(mask), -1).any(1)
        entry = mask._version, mask.flatten().nonzero().squeeze(1), left
        _known[mask] = entry
    return entry
