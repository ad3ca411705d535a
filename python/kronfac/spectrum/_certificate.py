"""What every method for eigenpairs ends with: Rayleigh-Ritz and measured residuals, or bounds on the residuals.

A method that carries a recurrence knows residuals up to its round-off E (n, k) without a product. What E is, products
with a few random combinations of the vectors tell: of a random orthonormal frame Q (k, q) the norm ‖EQ‖ is measured,
and the chance that it is much less than √(q/k) ‖E‖ is known (as in Dixon, "Estimating extremal eigenvalues and
condition numbers of matrices", SIAM J. Numer. Anal. 20, 1983).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from kronfac.linalg.subspace import Float64Array
from kronfac.spectrum._wanted import Wanted
from kronfac.spectrum.results import EigenResult, Ended

CHECKS = 3
"""Combinations that are multiplied: with fewer the bound is loose, more cost more."""
# That the error is more than the bound says, where all of it lies in one direction; elsewhere it is far less likely.
_UNSEEN = 0.01

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


def bounded(
    columns: Tensor,
    values: Float64Array,
    residuals: Float64Array,
    wanted: Wanted,
    threshold: float,
    products: int,
    ended: Ended,
) -> EigenResult:
    """The pairs as a method has them, with bounds on their residuals.

    Args:
        columns: approximate eigenvectors (n, k), orthonormal.
        values: their values.
        residuals: bounds, round-off included.
        wanted: for the order of the result.
        threshold: what a residual has to meet.
        products: spent so far.
        ended: why the search did.
    """
    order = wanted.arranged(values)
    return EigenResult(
        values=torch.from_numpy(values[order]).to(columns),
        vectors=columns[:, torch.from_numpy(order).to(columns.device)],
        residuals=torch.from_numpy(residuals[order]).to(columns),
        converged=torch.from_numpy(residuals[order] <= threshold).to(columns.device),
        products=products,
        ended=ended,
        measured=False,
    )


def random_frame(size: int, generator: Generator) -> Float64Array:
    """A random orthogonal matrix (k, k), of which any columns are a random frame."""
    draw = torch.randn(size, size, generator=generator, dtype=torch.float64).numpy()
    basis, triangle = np.linalg.qr(draw)
    frame: Float64Array = basis * np.where(np.diag(triangle) < 0, -1.0, 1.0)
    return frame


def error_bound(seen: float, size: int) -> float:
    """A bound on ‖E‖_F for an unknown E (n, k), that fails with probability 1 % at most.

    For a unit vector e the squared length of Qᵀe is Beta(q/2, (k - q)/2) distributed. Its density is at most
    x^(q/2 - 1) / B, which bounds the probability of a small one.

    Args:
        seen: ‖EQ‖_F of a random frame Q (k, CHECKS).
        size: k, at least CHECKS + 2.
    """
    a, b = CHECKS / 2, (size - CHECKS) / 2
    logarithm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    share = math.exp((math.log(_UNSEEN * a) + logarithm) / a)
    return seen / math.sqrt(min(share, 1.0))


def inner_products(first: Tensor, second: Tensor) -> Float64Array:
    """XᵀY summed in float64, a few rows at a time to bound the scratch memory."""
    total = torch.zeros(first.shape[1], second.shape[1], dtype=torch.float64, device=first.device)
    for low in range(0, first.shape[0], _ROWS):
        total += first[low : low + _ROWS].double().mT @ second[low : low + _ROWS].double()
    result: Float64Array = total.cpu().numpy()
    return result
