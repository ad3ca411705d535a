"""Plain torch reference of `kronfac::damped_eigh`: the truth for its tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def damped_eigh(
    factors: Sequence[Tensor], damping: Tensor, basis: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Diagonalise each ``factors[i] + damping[i] I`` with LAPACK, one after another; `basis` cannot change the result.

    Only the lower triangles are read. ``info`` follows `kronfac.ops.damped_eigh`.
    """
    del basis
    values, vectors, infos = [], [], []
    for factor, value in zip(factors, damping.expand(len(factors)), strict=True):
        if bool(factor.tril().isfinite().all()):
            eigenvalues, eigenvectors = torch.linalg.eigh(factor, UPLO="L")
            info = 0
        else:
            eigenvalues, eigenvectors = torch.full_like(factor[:, 0], torch.nan), torch.full_like(factor, torch.nan)
            info = -1
        # clamp keeps NaN, and the floor is applied after the shift: rounding must not leave a value below the damping.
        values.append((eigenvalues + value).clamp(min=value))
        vectors.append(eigenvectors)
        infos.append(info)
    return values, vectors, torch.tensor(infos, dtype=torch.int32, device=damping.device)
