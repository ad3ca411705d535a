"""Autocast stays out of the arithmetic of statistics and steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_AS_IT_IS = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off for a kind of device.

    Where it is off already nothing is entered: entering takes as long as two small operators, and a forward under
    recording would enter once for each layer.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _AS_IT_IS
