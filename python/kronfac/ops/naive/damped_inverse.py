"""Plain torch reference of `kronfac::damped_inverse`: the truth for its tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def damped_inverse(factors: Sequence[Tensor], damping: Tensor) -> tuple[list[Tensor], Tensor]:
    """Invert each ``factors[i] + damping[i] I`` with LAPACK's Cholesky factorisation, one after another.

    Only the lower triangles are read. ``info`` follows `kronfac.ops.damped_inverse`.
    """
    inverses, infos = [], []
    for factor, value in zip(factors, damping.expand(len(factors)), strict=True):
        lower = factor.tril()
        damped = lower + lower.tril(-1).mT + value * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        if not bool(damped.isfinite().all()):
            inverse, info = torch.full_like(damped, torch.nan), -1
        else:
            root, order = torch.linalg.cholesky_ex(damped)
            info = int(order)
            inverse = torch.cholesky_inverse(root) if info == 0 else torch.full_like(damped, torch.nan)
        inverses.append(inverse)
        infos.append(info)
    return inverses, torch.tensor(infos, dtype=torch.int32, device=damping.device)
