"""Which values may be read without waiting for a device, and which keep their memory from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def at_hand(tensor: Tensor) -> bool:
    """Whether reading is free: on the CPU, where arithmetic with numbers costs less than operators on tiny tensors.

    On an accelerator the host would wait, so what depends on the value stays a tensor there.
    """
    return tensor.is_cpu


def deferrable(tensor: Tensor) -> bool:
    """Whether a parameter there can be updated under a condition that only the device knows."""
    return not at_hand(tensor) and tensor.device.type in ("cpu", "cuda")  # where torch's fused SGD is


def brought(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, without waiting for that of an accelerator."""
    # A copy to the host that nobody waits for would be read before it is there.
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")


def lasting(tensor: Tensor) -> Tensor:
    """The tensor as it is now: on an accelerator a copy, because steps there write into what the optimizer holds."""
    return tensor if at_hand(tensor) else tensor.clone()


def all_lasting(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of each."""
    return {key: lasting(tensor) for key, tensor in tensors.items()}
