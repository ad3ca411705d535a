"""Plain torch reference of `kronfac::kron_precondition`: the truth for its tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kron_precondition(
    grads: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return ``left[i] @ grads[i] @ right[i]`` and its inner product with ``grads[i]``, layer by layer."""
    out, dots = [], []
    for grad, outer, inner in zip(grads, left, right, strict=True):
        wide = grad.to(outer.dtype)
        product = outer @ wide @ inner
        out.append(product.to(grad.dtype))
        dots.append((product * wide).sum())
    return out, torch.stack(dots) if dots else torch.zeros(0)
