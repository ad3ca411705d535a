"""What every method for eigenpairs ends with: Rayleigh-Ritz on the vectors found, and measured residuals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.subspace import Float64Array
from kronfac.spectrum._wanted import Wanted
from kronfac.spectrum.results import EigenResult, Ended

# Rows converted to float64 at a time when inner products are measured.
_ROWS = 65_536


def certified(
    columns: Tensor, images: Tensor, wanted: Wanted, threshold: float, products: int, ended: Ended
) -> EigenResult:
    """Eigenpairs from vectors and their products: exact residuals, slightly better values.

    Args:
        columns: approximate eigenvectors (n, k), about orthonormal.
        images: A times these (n, k).
        wanted: for the order of the result.
        threshold: what a residual has to meet.
        products: spent so far.
        ended: why the search did.
    """
    # The vectors are orthonormal up to round-off; the Cholesky factor of their Gram matrix takes care of that.
    inverse = np.linalg.inv(np.linalg.cholesky(inner_products(columns, columns)))
    projection = inverse @ inner_products(columns, images) @ inverse.T
    values, rotation = np.linalg.eigh((projection + projection.T) / 2)
    order = wanted.arranged(values)
    values = values[order]
    turn = torch.from_numpy(np.ascontiguousarray(inverse.T @ rotation[:, order])).to(columns)
    vectors, images = columns @ turn, images @ turn
    eigenvalues = torch.from_numpy(values).to(columns)
    residuals = torch.linalg.vector_norm(images - vectors * eigenvalues, dim=0, dtype=torch.float64).to(columns)
    return EigenResult(
        values=eigenvalues,
        vectors=vectors,
        residuals=residuals,
        converged=residuals <= threshold,
        products=products,
        ended=ended,
    )


def uncertified(
    columns: Tensor, values: Float64Array, residuals: Float64Array, wanted: Wanted, threshold: float, products: int
) -> EigenResult:
    """The pairs of an interrupted search as they stand.

    Args:
        columns: approximate eigenvectors (n, k), orthonormal.
        values: their values.
        residuals: as the method has them, round-off included.
        wanted: for the order of the result.
        threshold: what a residual has to meet.
        products: spent so far.
    """
    order = wanted.arranged(values)
    return EigenResult(
        values=torch.from_numpy(values[order]).to(columns),
        vectors=columns[:, torch.from_numpy(order).to(columns.device)],
        residuals=torch.from_numpy(residuals[order]).to(columns),
        converged=torch.from_numpy(residuals[order] <= threshold).to(columns.device),
        products=products,
        ended="interrupted",
    )


def inner_products(first: Tensor, second: Tensor) -> Float64Array:
    """XᵀY summed in float64, a few rows at a time to bound the scratch memory."""
    total = torch.zeros(first.shape[1], second.shape[1], dtype=torch.float64, device=first.device)
    for low in range(0, first.shape[0], _ROWS):
        total += first[low : low + _ROWS].double().mT @ second[low : low + _ROWS].double()
    result: Float64Array = total.cpu().numpy()
    return result
