"""Block Lanczos with full reorthogonalisation and thick restart: several start vectors that grow together.

Sources: Golub & Underwood, "The block Lanczos method for computing eigenvalues" (Mathematical Software III, 1977); the
replacement of directions that run out as in Baglama, Calvetti & Reichel, "IRBL: an implicitly restarted block-Lanczos
method" (SIAM J. Sci. Comput. 24, 2003); thick restart as in Wu & Simon (SIAM J. Matrix Anal. Appl. 22, 2000).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.lanczos import check_symmetric
from kronfac.linalg.subspace import BREAKDOWN, Float64Array, Subspace, norm
from kronfac.linalg.symmetric import CheckedOperator
from kronfac.ops import orthogonalize_


class BlockKrylovSubspace(Subspace):
    """The subspace of block Lanczos, with the orthonormal rows W to grow by.

    After every `expand`, A Vᵀ = Vᵀ T + Wᵀ C with W orthogonal to V: for a Ritz pair (θ, Vᵀs) the residual norm is
    ‖C s‖. Rows of W that run out, where part of V is an invariant subspace, are replaced by random ones with zeros in
    C, which keeps the relation: an eigenvalue shows as many of its copies as W has rows, and later the others.
    """

    def __init__(self, operator: CheckedOperator, capacity: int, block: int, generator: torch.Generator) -> None:
        super().__init__(operator, capacity, generator)
        self.block = block
        self._next: Tensor | None = None
        self._coupling: Float64Array = np.zeros((0, 0))  # C

    @property
    def width(self) -> int:
        """The block size, or what is left of the space."""
        return min(self.block, self.operator.size - self.size)

    def expand(self) -> None:
        """Add the rows W to the basis; costs a product each, in one call of op @ V.

        Raises:
            ValueError: the product shows that the operator is not symmetric.
        """
        fresh = self._next is None
        rows = self._filled([]) if self._next is None else self._next
        low, high = self.size, self.size + len(rows)
        self.basis[low:high] = rows
        products = self.operator.matmat(self.basis[low:high].mT).mT.contiguous()
        coefficients = np.stack(
            [orthogonalize_(product, self.basis[:high]).to("cpu", torch.float64).numpy() for product in products]
        )
        self.norm = max(self.norm, float(np.abs(coefficients).max()))
        own = coefficients[:, low:]
        # Each entry within the block is measured twice, and C is what the recurrence expects of the others.
        check_symmetric(self.operator, own, own.T, self.norm)
        if not fresh:
            check_symmetric(self.operator, self._coupling, coefficients[:, :low], self.norm)
        coefficients[:, low:] = (own + own.T) / 2
        self.projection[low:high, :high] = coefficients
        self.projection[:high, low:high] = coefficients.T
        self.size = high
        self._grow(products, low)

    def coupling(self, coordinates: Float64Array) -> Float64Array:
        """C s for each column s."""
        coupling: Float64Array = self._coupling @ coordinates
        return coupling

    def directions(self) -> Tensor | None:
        """The rows W."""
        return self._next if len(self._coupling) else None

    def restart(self, values: Float64Array, coordinates: Float64Array) -> None:
        """Keep only the given Ritz pairs and the directions to grow in."""
        super().restart(values, coordinates)
        self._coupling = self._coupling @ coordinates

    def forget_direction(self) -> None:
        """Grow next in fresh random directions."""
        self._next = None
        self._coupling = np.zeros((0, self.size))

    def _grow(self, products: Tensor, low: int) -> None:
        """Find W and C from what is left of the last products, whose rows entered the basis at `low`."""
        epsilon = self.operator.epsilon
        lengths = [norm(product) for product in products]
        found: list[Tensor] = []
        shares: list[list[float]] = []  # of each remainder in each row found
        left = set(range(len(products)))
        # The longest first: of the others only what is new is left, and those with nothing new come last.
        while left and self.size + len(found) < self.operator.size:
            chosen = max(left, key=lambda index: lengths[index])
            # Normalising what is left by rounding would amplify noise.
            if lengths[chosen] <= BREAKDOWN * epsilon * self.norm:
                break
            left.remove(chosen)
            vector = products[chosen] / lengths[chosen]
            if lengths[chosen] < epsilon**0.5 * self.norm:
                # Cancellation left few correct digits: orthogonal relative to the product, not to the remainder.
                orthogonalize_(vector, self.basis[: self.size])
                for row in found:
                    orthogonalize_(vector, row[None])
                length = norm(vector)
                if length < 0.5:
                    continue
                vector /= length
            share = [0.0] * len(products)
            share[chosen] = lengths[chosen]
            for index in left:
                share[index] = float(orthogonalize_(products[index], vector[None]))
                lengths[index] = norm(products[index])
            found.append(vector)
            shares.append(share)
        if self.complete:
            self._next, self._coupling = None, np.zeros((0, self.size))
            return
        # As many rows as fit beside the rest: those replaced couple to nothing.
        self._coupling = np.zeros((self.width, self.size))
        if shares:
            self._coupling[: len(shares), low:] = shares
        self._next = self._filled(found)

    def _filled(self, found: list[Tensor]) -> Tensor:
        """The rows found so far and as many random ones as the width asks for, (width, n)."""
        rows = torch.empty(self.width, self.operator.size, dtype=self.operator.dtype, device=self.operator.device)
        for index in range(len(rows)):
            rows[index] = found[index] if index < len(found) else self.random_direction(rows[:index])
        return rows
