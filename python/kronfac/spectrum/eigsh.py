"""Extreme eigenvalues of a symmetric operator by thick-restart Lanczos."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronfac.linalg.lanczos import Float64Array, KrylovSubspace
from kronfac.linalg.probes import make_generator
from kronfac.linalg.symmetric import CheckedOperator, SymmetricOperator, check_operator
from kronfac.spectrum._options import BASIS_BYTES, Progress, check_choice, check_count, check_positive
from kronfac.spectrum.results import EigenResult

ORDERS = ("magnitude", "largest", "smallest")

# A search for missed copies ends when an eigenvalue further out than the k-th by this share of the spectrum's width
# would have been seen with this probability of failure.
_MISSED_SHARE = 0.01
_MISSED_PROBABILITY = 1e-3
# Rows converted to float64 at a time when inner products are measured.
_ROWS = 65_536


def eigsh(
    op: SymmetricOperator,
    k: int = 1,
    which: str = "magnitude",
    *,
    tol: float = 1e-5,
    max_products: int | None = None,
    basis_size: int | None = None,
    multiplicity: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> EigenResult:
    """Find k extreme eigenpairs of a symmetric operator, each with the residual that certifies it.

    Lanczos with two-pass full reorthogonalisation, hence no spurious copies, and thick restart when storage is full (Wu
    & Simon 2000). A single Krylov sequence sees one copy only of a repeated eigenvalue, so the search then goes on from
    fresh random directions orthogonal to what was found, until none is likely to be missing (bound of Kuczyński &
    Woźniakowski 1992). At the end the k vectors are multiplied once more and their residuals measured.

    Args:
        op: a symmetric operator with `shape` and `@` (`kronfac.operators`, a torch matrix); n is its size.
        k: number of eigenpairs, 1 to n.
        which: "magnitude" (largest |λ|), "largest" or "smallest" (algebraically).
        tol: a pair has converged when ‖Av - λv‖ <= tol ‖A‖₂, with ‖A‖₂ the largest |Ritz value| seen. Then an exact
            eigenvalue lies within tol ‖A‖₂ of λ; the usual error is of the order of the residual squared over the gap.
            Below about 1e-6 it asks for more than float32 products can give.
        max_products: the most products to spend, at least 2k (default max(1000, 20k)); the last k measure residuals.
        basis_size: vectors stored before a restart, at least min(n, k + 3). Default: up to max(200, 4k) as long as they
            take less than 1 GiB, but never fewer than max(2k, k + 20).
        multiplicity: search for further copies of repeated eigenvalues; False saves some tens of products and accepts
            one copy of each.
        seed: of the start vector; equal seeds give equal results.
        progress: called as progress(products, None) after each product.

    Returns:
        The pairs in descending order of |λ| for "magnitude", descending for "largest", ascending for "smallest". Pairs
        that did not meet the tolerance within `max_products` are returned with `converged` False.

    Raises:
        TypeError: `op` is no operator, or an option has the wrong type.
        ValueError: `op` is not square or not symmetric, its product is not finite, k > n, or an option is out of range.
    """
    caller = "kronfac.spectrum.eigsh"
    operator = check_operator(op, caller)
    k = check_count(k, "k", caller, least=1)
    if k > operator.size:
        raise ValueError(f"{caller}: k: expected at most n = {operator.size} eigenpairs, got {k}")
    which = check_choice(which, "which", caller, ORDERS)
    tol = check_positive(tol, "tol", caller)
    if max_products is None:
        max_products = max(1000, 20 * k)
    max_products = check_count(max_products, "max_products", caller, least=2 * k)
    least_basis = min(operator.size, k + 3)
    if basis_size is None:
        affordable = BASIS_BYTES // (operator.size * torch.finfo(operator.dtype).bits // 8)
        basis_size = max(2 * k, k + 20, min(affordable, max(200, 4 * k)))
    basis_size = check_count(basis_size, "basis_size", caller, least=least_basis)
    search = _Search(
        operator,
        KrylovSubspace(operator, basis_size, make_generator(seed, caller)),
        k=k,
        which=which,
        tol=tol,
        budget=max_products - k,
        progress=progress,
    )
    search.run()
    while multiplicity and search.has_converged and not search.subspace.complete and search.look_for_copies():
        pass
    return search.certify()


class _Search:
    """The state of one call: a Krylov subspace, what is wanted of it, and the products spent."""

    def __init__(
        self,
        operator: CheckedOperator,
        subspace: KrylovSubspace,
        *,
        k: int,
        which: str,
        tol: float,
        budget: int,
        progress: Progress | None,
    ) -> None:
        self.operator = operator
        self.subspace = subspace
        self.k = k
        self.which = which
        # Tighter than the unit round-off cannot be met by any product.
        self.tol = max(tol, operator.epsilon)
        self.budget = budget
        self.progress = progress
        self.products = 0
        self.has_converged = False

    def run(self) -> None:
        """Grow and restart until the k wanted pairs have converged or the budget is spent."""
        while self.products < self.budget:
            self._expand()
            if not self._check_due():
                continue
            values, coordinates, residuals, order = self._ordered_ritz()
            if self._wanted_converged(residuals, order):
                self.has_converged = True
                return
            self._restart_if_full(values, coordinates, order)

    def look_for_copies(self) -> bool:
        """Search orthogonally to the converged pairs; return whether others took their place and converged too."""
        values, coordinates, _, order = self._ordered_ritz()
        wanted = order[: self.k]
        before = self._scores(values[wanted])
        self.subspace.restart(values[wanted], coordinates[:, wanted])
        self.subspace.forget_direction()
        steps, restarted = 0, False
        while self.products < self.budget:
            self._expand()
            steps += 1
            if not self._check_due():
                continue
            values, coordinates, residuals, order = self._ordered_ritz()
            gain = float((self._scores(values[order[: self.k]]) - before).sum())
            settled = self._wanted_converged(residuals, order)
            if gain > self.k * self.tol * self.subspace.norm:
                if settled:
                    return True
            elif settled and (
                self.subspace.complete or self._nothing_missed(values, residuals, order, steps, restarted=restarted)
            ):
                return False
            restarted |= self._restart_if_full(values, coordinates, order)
        self.has_converged = False
        return False

    def certify(self) -> EigenResult:
        """Rayleigh-Ritz on the wanted vectors with measured products: exact residuals, slightly better values."""
        _, coordinates, _, order = self._ordered_ritz()
        columns = self.subspace.vectors(coordinates[:, order[: self.k]]).mT
        images = self.operator.matmat(columns)
        self._count(columns.shape[1])
        # The vectors are orthonormal up to round-off; the Cholesky factor of their Gram matrix takes care of that.
        inverse = np.linalg.inv(np.linalg.cholesky(_inner_products(columns, columns)))
        projection = inverse @ _inner_products(columns, images) @ inverse.T
        values, rotation = np.linalg.eigh((projection + projection.T) / 2)
        order = np.argsort(-self._scores(values), kind="stable")
        values = values[order]
        turn = torch.from_numpy(np.ascontiguousarray(inverse.T @ rotation[:, order])).to(columns)
        vectors, images = columns @ turn, images @ turn
        eigenvalues = torch.from_numpy(values).to(columns)
        residuals = torch.linalg.vector_norm(images - vectors * eigenvalues, dim=0, dtype=torch.float64).to(columns)
        return EigenResult(
            values=eigenvalues,
            vectors=vectors,
            residuals=residuals,
            converged=residuals <= self.tol * self.subspace.norm,
            products=self.products,
        )

    def _scores(self, values: Float64Array) -> Float64Array:
        """The larger, the more wanted."""
        if self.which == "magnitude":
            return np.abs(values)
        return values if self.which == "largest" else -values

    def _ordered_ritz(self) -> tuple[Float64Array, Float64Array, Float64Array, npt.NDArray[np.intp]]:
        values, coordinates, residuals = self.subspace.ritz()
        return values, coordinates, residuals, np.argsort(-self._scores(values), kind="stable")

    def _wanted_converged(self, residuals: Float64Array, order: npt.NDArray[np.intp]) -> bool:
        # Half the tolerance, since the measured residual adds round-off to the one that the recurrence predicts.
        return len(order) >= self.k and bool((residuals[order[: self.k]] <= 0.5 * self.tol * self.subspace.norm).all())

    def _nothing_missed(
        self,
        values: Float64Array,
        residuals: Float64Array,
        order: npt.NDArray[np.intp],
        steps: int,
        *,
        restarted: bool,
    ) -> bool:
        """Whether a further eigenvalue beyond the k-th would have shown by now.

        Args:
            values: Ritz values, ascending.
            residuals: their residuals.
            order: indices by how much they are wanted.
            steps: taken from a random start.
            restarted: whether storage was full since: the bound is then necessary but not enough.
        """
        rest = np.sort(order[self.k :])
        if len(rest) == 0:
            return False
        outermost = {"magnitude": [rest[0], rest[-1]], "largest": [rest[-1]], "smallest": [rest[0]]}[self.which]
        scores = self._scores(values)
        width = float(values.max() - values.min())
        gaps = scores[order[self.k - 1]] - scores[outermost] + _MISSED_SHARE * width
        if (residuals[outermost] <= self.tol * self.subspace.norm).all():
            return True
        if restarted and (residuals[outermost] > 0.1 * gaps).any():
            return False  # not settled yet: the outermost values may still move in among the wanted
        # P[λ - θ > share · width] <= 1.648 √n exp(-(2 steps - 1) √share) for the top Ritz value θ of a random start.
        share = min(1.0, float(gaps.min()) / width)
        needed = math.log(1.648 * math.sqrt(self.operator.size) / _MISSED_PROBABILITY)
        return (2 * steps - 1) * math.sqrt(share) >= needed

    def _restart_if_full(self, values: Float64Array, coordinates: Float64Array, order: npt.NDArray[np.intp]) -> bool:
        """Restart where storage is full; return whether it was."""
        if not self.subspace.full or self.subspace.complete:
            return False
        # Half of the room beyond k: neighbours of the wanted pairs speed up the next round, and it has room to grow.
        room, rest = (self.subspace.capacity - self.k) // 2, order[self.k :]
        if self.which == "magnitude":
            # From both ends: were only the larger side kept, what approaches at the other would be lost every time.
            low, rest = max(1, room // 2), np.sort(rest)
            rest = np.concatenate([rest[:low], rest[max(low, len(rest) - max(1, room - room // 2)) :]])
        else:
            rest = rest[: max(1, room)]
        keep = np.concatenate([order[: self.k], rest])
        self.subspace.restart(values[keep], coordinates[:, keep])
        return True

    def _check_due(self) -> bool:
        """Small projections are solved at every step, larger ones now and then: the cost is cubic in their size."""
        size = self.subspace.size
        return self.subspace.full or (size >= self.k and size % (1 + size // 40) == 0)

    def _expand(self) -> None:
        self.subspace.expand()
        self._count(1)

    def _count(self, products: int) -> None:
        self.products += products
        if self.progress is not None:
            self.progress(self.products, None)


def _inner_products(first: Tensor, second: Tensor) -> Float64Array:
    """XᵀY summed in float64, a few rows at a time to bound the scratch memory."""
    total = torch.zeros(first.shape[1], second.shape[1], dtype=torch.float64, device=first.device)
    for low in range(0, first.shape[0], _ROWS):
        total += first[low : low + _ROWS].double().mT @ second[low : low + _ROWS].double()
    result: Float64Array = total.cpu().numpy()
    return result
