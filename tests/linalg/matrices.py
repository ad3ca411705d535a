"""Symmetric matrices with known spectra."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def with_spectrum(
    values: Sequence[float] | npt.NDArray[np.float64], seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.tensor(np.asarray(values, dtype=np.float64))
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = (basis * eigenvalues) @ basis.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


class Counted:
    """A matrix as a bare operator: `shape` and `@` alone, counting products with single vectors."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = tuple(matrix.shape)
        self.dtype = matrix.dtype
        self.products = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.products += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.matrix @ vectors
