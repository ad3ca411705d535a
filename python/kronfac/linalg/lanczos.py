"""Lanczos with full reorthogonalisation: a growing, restartable subspace, and the tridiagonal form for quadrature.

Sources: Paige's analysis of lost orthogonality is why every new vector is orthogonalised against the whole basis, until
it is measured to be orthogonal; thick restart as in Wu & Simon, "Thick-restart Lanczos method for large symmetric
eigenvalue problems" (SIAM J. Matrix Anal. Appl. 22, 2000).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.subspace import BREAKDOWN, Subspace, orthogonalize_product_
from kronfac.linalg.subspace import Float64Array as Float64Array
from kronfac.linalg.subspace import norm as norm
from kronfac.linalg.symmetric import CheckedOperator
from kronfac.linalg.trace import StoppedError
from kronfac.ops import orthogonalize_


class KrylovSubspace(Subspace):
    """The subspace of single-vector Lanczos, with the direction to grow in.

    After every `expand`, A Vᵀ = Vᵀ T + β w e_lastᵀ with w orthogonal to V: for a Ritz pair (θ, Vᵀs) the residual norm
    is |β s_last|. β = 0 means that V spans an invariant subspace; the next direction is then drawn at random, which
    keeps the relation and lets the basis reach the rest of the space.
    """

    def __init__(self, operator: CheckedOperator, capacity: int, generator: torch.Generator) -> None:
        super().__init__(operator, capacity, generator)
        self.beta = 0.0
        self._next: Tensor | None = None
        self._follows_last = False

    @property
    def width(self) -> int:
        """One."""
        return 1

    def expand(self) -> None:
        """Add one basis vector; costs one product.

        Raises:
            ValueError: the product shows that the operator is not symmetric.
        """
        vector = self._next if self._next is not None else self.random_direction()
        row = self.size
        self.basis[row].copy_(vector)
        product = self.operator.matvec(vector)
        # After a restart the direction couples to every kept vector.
        coefficients = orthogonalize_product_(product, self.basis[: row + 1], row - 1 if self._follows_last else 0)
        self.norm = max(self.norm, float(np.abs(coefficients).max()))
        if self._follows_last:
            check_symmetry(self.operator, self.beta, float(coefficients[row - 1]), self.norm)
        self.projection[row, : row + 1] = coefficients
        self.projection[: row + 1, row] = coefficients
        self.size = row + 1
        self.beta = norm(product)
        self._next = self._normalised(product)
        self._follows_last = self._next is not None
        if self._next is None:
            self.beta = 0.0

    def coupling(self, coordinates: Float64Array) -> Float64Array:
        """β s_last for each column s."""
        return self.beta * coordinates[-1:]

    def directions(self) -> Tensor | None:
        """The direction w as a row."""
        return None if self._next is None else self._next[None]

    def restart(self, values: Float64Array, coordinates: Float64Array) -> None:
        """Keep only the given Ritz pairs and the direction to grow in."""
        super().restart(values, coordinates)
        # The direction now couples to every kept vector, not to the last one alone.
        self._follows_last = False

    def forget_direction(self) -> None:
        """Grow next in a fresh random direction."""
        self._next = None
        self._follows_last = False
        self.beta = 0.0

    def _normalised(self, remainder: Tensor) -> Tensor | None:
        """The remainder as a unit vector orthogonal to the basis, or None where nothing but round-off is left."""
        epsilon = self.operator.epsilon
        # Normalising what is left by rounding would amplify noise.
        if self.size == self.operator.size or self.beta <= BREAKDOWN * epsilon * self.norm:
            return None
        vector = remainder / self.beta
        if self.beta < epsilon**0.5 * self.norm:
            # Cancellation left few correct digits: orthogonal relative to the product, not relative to the remainder.
            orthogonalize_(vector, self.basis[: self.size])
            length = norm(vector)
            if length < 0.5:
                return None
            vector /= length
        return vector


def check_symmetry(operator: CheckedOperator, expected: float, measured: float, norm: float) -> None:
    """Compare β = v_jᵀ(A v_{j-1}) with v_{j-1}ᵀ(A v_j), which Lanczos has at no extra cost.

    Args:
        operator: the operator, for its round-off and the name in the message.
        expected: β of the previous step.
        measured: the coefficient of the previous basis vector in the new product.
        norm: a lower estimate of the operator's norm.

    Raises:
        ValueError: they differ by more than 100 √ε ‖A‖, far above round-off.
    """
    if abs(measured - expected) > 100 * operator.epsilon**0.5 * norm:
        raise ValueError(
            f"{operator.caller}: op: not symmetric: wᵀ(A v) = {expected:.6g} but vᵀ(A w) = {measured:.6g}; "
            "a random operator (dropout, shuffled or augmented data) looks like this, and so does one lost in "
            "round-off (a float32 model that fits its data perfectly: use model.double())"
        )


def check_symmetric(operator: CheckedOperator, expected: Float64Array, measured: Float64Array, norm: float) -> None:
    """`check_symmetry` of matrices of such products: of the entry that differs most."""
    if expected.size:
        worst = np.unravel_index(np.abs(expected - measured).argmax(), expected.shape)
        check_symmetry(operator, float(expected[worst]), float(measured[worst]), norm)


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Gauss quadrature of the spectral measure of one start vector.

    Attributes:
        nodes: Ritz values θ, ascending.
        weights: τ², with Στ² = 1.
        residuals: norms of the Ritz pairs' residuals: an eigenvalue lies within that of each node.
    """

    nodes: Float64Array
    weights: Float64Array
    residuals: Float64Array


def lanczos_quadratures(
    operator: CheckedOperator,
    starts: Tensor,
    steps: int,
    report: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[list[Quadrature], int]:
    """Run Lanczos from several start vectors in lockstep, so that every product serves all of them.

    Args:
        operator: the symmetric operator.
        starts: start vectors as columns (n, g), of any non-zero length.
        steps: m, at most n; a start whose Krylov space is exhausted earlier stops there (its quadrature is then exact).
        report: called with the products spent so far after each step.
        stop: asked after each step whether to end with those taken so far. So does a product that raises
            `StoppedError`; there are no quadratures where it was the first.

    Returns:
        One quadrature per start, from the eigenpairs (θ, y) of its tridiagonal T: nodes θ, weights (e₁ᵀy)² (Golub &
        Welsch 1969); and the number of products, counted per vector.
    """
    size, count = starts.shape
    epsilon = operator.epsilon
    # The vectors of one step side by side, as the rows that a product takes.
    bases = torch.empty(steps, count, size, dtype=operator.dtype, device=operator.device)
    diagonals = np.zeros((count, steps))
    betas = np.zeros((count, steps))
    lengths = np.zeros(count, dtype=np.int64)
    lengths_of_starts = torch.tensor([norm(start) for start in starts.mT], dtype=torch.float64)
    bases[0] = (starts.to(operator.dtype) / lengths_of_starts.to(device=operator.device, dtype=operator.dtype)).mT
    norms = np.zeros(count)
    active = list(range(count))
    products = 0
    for step in range(steps):
        current = bases[step, active]  # a copy: an operator may write to what it gets
        try:
            remainders = operator.matmat(current.mT).mT.contiguous()
        except StoppedError:
            break
        products += len(active)
        if report is not None:
            report(products)
        survivors: list[int] = []
        for position, probe in enumerate(active):
            remainder = remainders[position]
            basis = bases[: step + 1, probe]
            coefficients = orthogonalize_product_(remainder, basis, max(0, step - 1))
            alpha = float(coefficients[step])
            beta = norm(remainder)
            diagonals[probe, step], lengths[probe] = alpha, step + 1
            norms[probe] = max(norms[probe], abs(alpha), beta)
            if step > 0:
                check_symmetry(operator, float(betas[probe, step - 1]), float(coefficients[step - 1]), norms[probe])
            if step + 1 == size or beta <= BREAKDOWN * epsilon * norms[probe]:
                continue
            betas[probe, step] = beta
            survivors.append(probe)
            if step + 1 == steps:
                continue
            vector = torch.div(remainder, beta, out=bases[step + 1, probe])
            if beta < epsilon**0.5 * norms[probe]:
                orthogonalize_(vector, basis)
                vector /= norm(vector)
        active = survivors
        if not active or (stop is not None and stop()):
            break
    quadratures = []
    for probe in np.flatnonzero(lengths).tolist():
        length = int(lengths[probe])
        offdiagonal = betas[probe, : length - 1]
        tridiagonal = np.diag(diagonals[probe, :length]) + np.diag(offdiagonal, 1) + np.diag(offdiagonal, -1)
        nodes, vectors = np.linalg.eigh(tridiagonal)
        residuals = np.abs(betas[probe, length - 1] * vectors[-1])
        quadratures.append(Quadrature(nodes, vectors[0] ** 2, residuals))
    return quadratures, products
