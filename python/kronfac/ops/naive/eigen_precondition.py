"""Plain torch reference of `kronfac::eigen_precondition`: the truth for its tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def eigen_precondition(
    grads: Sequence[Tensor],
    left_vectors: Sequence[Tensor],
    right_vectors: Sequence[Tensor],
    eigenvalues: Sequence[Tensor],
    damping: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Return ``Q_L [(Q_L^T grad Q_R) / (E + damping)] Q_R^T`` and its inner product with the gradient, one by one."""
    out, dots = [], []
    shifts = damping.expand(len(grads))
    for grad, left, right, spectrum, shift in zip(grads, left_vectors, right_vectors, eigenvalues, shifts, strict=True):
        wide = grad.to(left.dtype)
        product = left @ ((left.mT @ wide @ right) / (spectrum + shift)) @ right.mT
        out.append(product.to(grad.dtype))
        dots.append((product * wide).sum())
    return out, torch.stack(dots) if dots else damping.new_zeros(0)
