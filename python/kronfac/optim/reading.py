"""Which values may be read without waiting for a device."""

from __future__ import annotations

from torch import Tensor


def at_hand(tensor: Tensor) -> bool:
    """Whether reading is free: on the CPU, where arithmetic with numbers costs less than operators on tiny tensors.

    On an accelerator the host would wait, so what depends on the value stays a tensor there.
    """
    return tensor.is_cpu
