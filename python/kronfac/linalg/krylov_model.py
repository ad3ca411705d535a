"""A quadratic model gᵀs + ½ sᵀHs on a growing subspace, and the global minimiser of its cubic form there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.lanczos import check_symmetry
from kronfac.linalg.subspace import BREAKDOWN, Float64Array, norm
from kronfac.linalg.symmetric import CheckedOperator
from kronfac.ops import orthogonalize_

_FIRST_ROWS = 16


@dataclass
class Chain:
    """The Krylov space of one start vector, as far as it was built.

    Attributes:
        next: in whose direction it goes on, not normalised and orthogonal to the basis; None where it is exhausted.
        rows: of the basis, in their order.
    """

    next: Tensor | None
    rows: list[int]


class KrylovModel:
    """An orthonormal basis V of the Krylov spaces of one or more start vectors, with T = V H Vᵀ.

    H Vᵀ = Vᵀ T + R: a column of R is 0 but for the last row of each chain, where it is the vector that the chain goes
    on with. So the part of H s outside the space is known for every s = Vᵀy without a product.

    Attributes:
        operator: H.
        basis: V in its first `size` rows.
        size: rows so far, and products.
        norm: the largest |coefficient| seen, a lower estimate of ‖H‖.
        chains: one for each start vector.
    """

    def __init__(self, operator: CheckedOperator) -> None:
        self.operator = operator
        rows = min(_FIRST_ROWS, operator.size)
        self.basis = torch.empty(rows, operator.size, dtype=operator.dtype, device=operator.device)
        self.size = 0
        self.norm = 0.0
        self.chains: list[Chain] = []
        self._projection: Float64Array = np.zeros((rows, rows))

    @property
    def projection(self) -> Float64Array:
        """T (size, size)."""
        return self._projection[: self.size, : self.size]

    @property
    def exhausted(self) -> bool:
        """Whether no chain can go on: the basis spans an invariant subspace."""
        return all(chain.next is None for chain in self.chains)

    def start(self, vector: Tensor) -> Chain:
        """Add a start vector, orthogonal to the basis and not 0; expand it before other chains."""
        chain = Chain(vector, [])
        self.chains.append(chain)
        return chain

    def expand(self, chain: Chain) -> None:
        """Add the next vector of a chain that is not exhausted; costs one product.

        Raises:
            ValueError: the product shows that the operator is not symmetric.
        """
        assert chain.next is not None
        row = self.size
        if row == len(self.basis):
            self._grow()
        beta = norm(chain.next)
        self.basis[row].copy_(chain.next).div_(beta)
        product = self.operator.matvec(self.basis[row])
        coefficients = orthogonalize_(product, self.basis[: row + 1]).to("cpu", torch.float64).numpy()
        self.norm = max(self.norm, float(np.abs(coefficients).max()))
        if chain.rows:
            check_symmetry(self.operator, beta, float(coefficients[chain.rows[-1]]), self.norm)
        self._projection[row, : row + 1] = coefficients
        self._projection[: row + 1, row] = coefficients
        self.size = row + 1
        chain.rows.append(row)
        chain.next = self._continued(product)
        for other in self.chains:
            if other is not chain and other.next is not None:
                orthogonalize_(other.next, self.basis[row : row + 1])
                other.next = self._continued(other.next)

    def outside(self, coordinates: Float64Array) -> float:
        """Norm of the part of H s outside the space, for s = Vᵀy."""
        parts = [
            (float(coordinates[chain.rows[-1]]), chain.next)
            for chain in self.chains
            if chain.rows and chain.next is not None
        ]
        if not parts:
            return 0.0
        total = parts[0][1] * parts[0][0]
        for factor, vector in parts[1:]:
            total.add_(vector, alpha=factor)
        return norm(total)

    def left_out(self, chain: Chain, coordinates: Float64Array) -> float:
        """Norm of what the chain leaves out of H u, for u with these coordinates in the chain's own rows."""
        return 0.0 if chain.next is None else abs(float(coordinates[-1])) * norm(chain.next)

    def vector(self, coordinates: Float64Array) -> Tensor:
        """Vᵀy (n,)."""
        return torch.from_numpy(coordinates).to(self.basis) @ self.basis[: self.size]

    def _continued(self, remainder: Tensor) -> Tensor | None:
        """The remainder of a product, orthogonal to the basis, or None where nothing but round-off is left."""
        length = norm(remainder)
        floor = BREAKDOWN * self.operator.epsilon * self.norm
        if self.size == self.operator.size or length <= floor:
            return None
        if length < self.operator.epsilon**0.5 * self.norm:
            # Cancellation left few correct digits: orthogonal relative to the product, not relative to the remainder.
            remainder /= length
            orthogonalize_(remainder, self.basis[: self.size])
            if norm(remainder) < 0.5:
                return None
            remainder *= length
        return remainder

    def _grow(self) -> None:
        rows = min(2 * len(self.basis), self.operator.size)
        basis = torch.empty(rows, self.operator.size, dtype=self.basis.dtype, device=self.basis.device)
        basis[: self.size] = self.basis
        projection = np.zeros((rows, rows))
        projection[: self.size, : self.size] = self._projection
        self.basis, self._projection = basis, projection


def minimise_cubic(values: Float64Array, gradient: Float64Array, sigma: float) -> tuple[Float64Array, float]:
    """The global minimiser of cᵀy + ½ Σ λᵢ yᵢ² + σ/3 ‖y‖³, by the secular equation ‖(Λ + μ)⁻¹c‖ = μ/σ.

    Args:
        values: λ (k,), ascending.
        gradient: c (k,).
        sigma: σ > 0.

    Returns:
        y, and μ = σ‖y‖ >= max(0, -λ₁). In the hard case (c without a component along the lowest eigenvector, μ = -λ₁)
        y gets what is missing in length along that eigenvector; the other sign would do as well.
    """
    bound = max(0.0, -float(values[0]))
    gaps = values + bound  # from here on μ = bound + t: differences of eigenvalues keep their digits
    length = float(np.linalg.norm(gradient))

    def excess(t: float) -> float:
        return sigma * float(np.linalg.norm(gradient / (gaps + t))) - (bound + t)

    if bound > 0:
        low = float(np.finfo(np.float64).eps) * float(np.abs(values).max())
        if excess(low) <= 0:
            y = -gradient / (gaps + low)
            missing = ((bound + low) / sigma) ** 2 - float(y @ y)
            y[0] = math.copysign(math.sqrt(float(y[0]) ** 2 + max(missing, 0.0)), float(y[0]))
            return y, bound + low
    elif length <= 0:
        return np.zeros_like(gradient), 0.0
    else:
        low = _positive_root(float(gaps[-1]), sigma * length)  # from ‖(Λ + t)⁻¹c‖ >= ‖c‖ / (λ_max + t)
    high = _positive_root(bound, sigma * length)  # from ‖(Λ + μ)⁻¹c‖ <= ‖c‖ / t
    t = _bisect(excess, low, high)
    return -gradient / (gaps + t), bound + t


def _positive_root(b: float, c: float) -> float:
    """Of t² + bt - c = 0, b >= 0, c > 0."""
    return 2 * c / (b + math.sqrt(b * b + 4 * c))


def _bisect(excess: Callable[[float], float], low: float, high: float) -> float:
    """Root of a decreasing function between positive ends, to the last digits; halves the ratio of the ends."""
    while high > low * (1 + 4 * float(np.finfo(np.float64).eps)):
        middle = math.sqrt(low) * math.sqrt(high)
        if not low < middle < high:
            break
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return high
