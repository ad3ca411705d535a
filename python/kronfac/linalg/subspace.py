"""An orthonormal basis with the projection of an operator on it: what the Krylov subspaces share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from kronfac.linalg.symmetric import CheckedOperator
from kronfac.ops import orthogonalize_

Float64Array = npt.NDArray[np.float64]

# Columns of the basis rotated at a time when restarting: bounds the scratch memory to (kept, 65536).
_RESTART_COLUMNS = 65_536
BREAKDOWN = 32.0
"""A remainder below this many round-offs of the operator's norm is taken for the rounding error of its product. That is
a few round-offs; noise that passes costs products but no accuracy, a remainder cut off costs at most its own size."""


def norm(vector: Tensor) -> float:
    """Euclidean norm, summed in float64.

    torch sums a float32 norm in float32, lane by lane: at n = 10⁶ it is off by 10⁻⁴, and every Ritz value with it.
    """
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


# Above this share of what is left, a second pass follows. A pass leaves what the basis lacks in orthogonality times
# this share, so that a basis of any size stays as orthogonal as the round-off of one pass.
_SECOND_PASS = 0.1
# Rows of the basis for each row read twice beforehand, below which two passes over all read no more.
_WORTHWHILE = 2


def orthogonalize_product_(product: Tensor, basis: Tensor, first: int) -> Float64Array:
    """Orthogonalise the product of a Lanczos step against the basis, in place.

    It couples to the last rows alone, up to round-off. Once these components are out, what the other rows find is so
    small that a single pass over all of them is enough, where it was measured to be: the criterion of Daniel, Gragg,
    Kaufman & Stewart (Math. Comp. 30, 1976). The basis is then read twice instead of three times.

    Args:
        product: (n,), changed.
        basis: orthonormal rows (m, n).
        first: row with which those begin that the product couples to; 0 where any may be.

    Returns:
        The coefficients (m,) of the rows in the product.
    """
    rows = len(basis)
    if rows < 2 * _WORTHWHILE * (rows - first):
        return _coefficients(product, basis, 2)
    near = _coefficients(product, basis[first:], 1)
    coefficients = _coefficients(product, basis, 1)
    if float(np.linalg.norm(coefficients)) > _SECOND_PASS * float(torch.linalg.vector_norm(product)):
        coefficients += _coefficients(product, basis, 1)
    coefficients[first:] += near
    return coefficients


def _coefficients(vector: Tensor, basis: Tensor, passes: int) -> Float64Array:
    found: Float64Array = orthogonalize_(vector, basis, passes).to("cpu", torch.float64).numpy()
    return found


class Subspace(ABC):
    """A growing, restartable basis V of orthonormal rows with T = V A Vᵀ.

    Attributes:
        operator: A.
        capacity: most rows that are stored.
        generator: of random directions.
        basis: V in its first `size` rows.
        projection: T in its first `size` rows and columns.
        size: rows so far.
        norm: the largest |Ritz value| or |coefficient| seen, a lower estimate of the operator's norm.
    """

    def __init__(self, operator: CheckedOperator, capacity: int, generator: Generator) -> None:
        self.operator = operator
        self.capacity = min(capacity, operator.size)
        self.generator = generator
        self.basis = torch.empty(self.capacity, operator.size, dtype=operator.dtype, device=operator.device)
        self.projection: Float64Array = np.zeros((self.capacity, self.capacity))
        self.size = 0
        self.norm = 0.0
        self._dropped: Float64Array = np.zeros((0, 0))  # like C below, of directions that were forgotten

    @property
    @abstractmethod
    def width(self) -> int:
        """Rows that the next `expand` adds, each for one product."""

    @property
    def full(self) -> bool:
        """Whether storage is used up."""
        return self.complete or self.size + self.width > self.capacity

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space, so that the Ritz pairs are all eigenpairs."""
        return self.size == self.operator.size

    @abstractmethod
    def expand(self) -> None:
        """Add `width` basis vectors by one call of op @ V.

        Raises:
            ValueError: the product shows that the operator is not symmetric.
        """

    @abstractmethod
    def coupling(self, coordinates: Float64Array) -> Float64Array:
        """C s for each column s, where A Vᵀ = Vᵀ T + Wᵀ C with the orthonormal rows W to grow by."""

    @abstractmethod
    def directions(self) -> Tensor | None:
        """W, as rows in the order of `coupling`; None where C is zero."""

    @abstractmethod
    def forget_direction(self) -> None:
        """Grow next in fresh random directions."""

    def ritz(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Ritz values (ascending), their coordinates in the basis (columns), and residual norms."""
        values, coordinates = np.linalg.eigh(self.projection[: self.size, : self.size])
        self.norm = max(self.norm, float(np.abs(values).max()))
        residuals: Float64Array = np.linalg.norm(self.coupling(coordinates), axis=0)
        return values, coordinates, residuals

    @property
    def forgetful(self) -> bool:
        """Whether `start_afresh` left something out of the residuals."""
        return len(self._dropped) > 0

    def forgotten(self, coordinates: Float64Array) -> Float64Array:
        """What `start_afresh` left out of the residual norms, at most, for each column of `coordinates`."""
        residuals: Float64Array = np.linalg.norm(self._dropped @ coordinates[: self._dropped.shape[1]], axis=0)
        return residuals

    def vectors(self, coordinates: Float64Array) -> Tensor:
        """Combinations of the basis, one per column of `coordinates` (size, k), as rows (k, n)."""
        rotation = torch.from_numpy(np.ascontiguousarray(coordinates.T)).to(self.basis)
        return rotation @ self.basis[: self.size]

    def restart(self, values: Float64Array, coordinates: Float64Array) -> None:
        """Keep only the given Ritz pairs; the direction to grow in stays, so that nothing learnt about them is lost."""
        kept = len(values)
        rotation = torch.from_numpy(np.ascontiguousarray(coordinates.T)).to(self.basis)
        for first in range(0, self.operator.size, _RESTART_COLUMNS):
            columns = slice(first, first + _RESTART_COLUMNS)
            self.basis[:kept, columns] = rotation @ self.basis[: self.size, columns]
        self.projection[:kept, :kept] = np.diag(values)
        self._dropped = self._dropped @ coordinates[: self._dropped.shape[1]]
        self.size = kept

    def start_afresh(self, values: Float64Array, coordinates: Float64Array) -> None:
        """Keep only the given Ritz pairs, which must have converged, and grow next in fresh random directions."""
        couplings = self.coupling(coordinates)
        self.restart(values, coordinates)
        self._dropped = np.vstack([self._dropped.reshape(-1, self.size), couplings])
        self.forget_direction()

    def random_direction(self, *others: Tensor) -> Tensor:
        """A random unit vector orthogonal to the basis and to other orthonormal rows; there must be room for it."""
        return random_direction(self.operator, self.generator, self.basis[: self.size], *others)


def random_direction(operator: CheckedOperator, generator: Generator, *bases: Tensor) -> Tensor:
    """A random unit vector (n,) orthogonal to orthonormal rows, which together do not span the space."""
    while True:
        draw = torch.randn(operator.size, generator=generator, dtype=operator.dtype).to(operator.device)
        draw /= norm(draw)
        for _ in range(2):  # the second time after normalising, when almost all of the space is taken
            for rows in bases:
                orthogonalize_(draw, rows)
            length = norm(draw)
            if length <= 10 * operator.epsilon:
                break
            draw /= length
        else:
            return draw
