"""Whether all entries of a tensor are finite, in one reading of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no entry is infinite or NaN.

    `torch.isfinite` writes four intermediate tensors on the CPU, which takes several per cent of a product with a
    Hessian. A sum with an entry that is not finite is not finite either, so that a finite sum settles it; finite
    entries may overflow in the sum, and then each is looked at.
    """
    if values.is_floating_point() and math.isfinite(float(values.detach().sum())):
        return True
    return bool(torch.isfinite(values).all())
