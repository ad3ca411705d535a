"""LOBPCG: the best pairs in the span of a block of vectors, their residuals and their previous steps.

Sources: Knyazev, "Toward the optimal preconditioned eigensolver: locally optimal block preconditioned conjugate
gradient method" (SIAM J. Sci. Comput. 23, 2001); an orthonormal basis of the three parts, with the steps chosen
orthogonal to the new vectors in coordinates, as in Hetmaniuk & Lehoucq, "Basis selection in LOBPCG" (J. Comput. Phys.
218, 2006); directions that hold nothing new are dropped as in Stathopoulos & Wu, "A block orthogonalization procedure
with constant synchronization requirements" (SIAM J. Sci. Comput. 23, 2002).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from kronfac.linalg.lanczos import check_symmetric
from kronfac.linalg.subspace import Float64Array, norm, random_direction
from kronfac.linalg.symmetric import CheckedOperator
from kronfac.linalg.trace import StoppedError
from kronfac.ops import orthogonalize_
from kronfac.spectrum._budget import Budget
from kronfac.spectrum._certificate import bounded, certified, inner_products
from kronfac.spectrum._wanted import Indices, Wanted
from kronfac.spectrum.results import EigenResult

# A direction of which less than this share of its length is new is round-off where the vectors are float32.
_NEW_SHARE = 1e-5
# A step whose coordinates hold less than this that the others do not.
_NEW_STEP = 1e-6
# Images are carried along by the recurrence; where these have drifted too far they are multiplied anew, so many times.
_REFRESHES = 3
# Residuals of so many round-offs of the operator's norm are noise, and so would be a step along them.
_NOISE = 8.0
# What a step of the recurrence adds to the residuals, in round-offs of the operator's norm.
_ROUND_OFF = 4.0


class LobpcgSearch:
    """The state of one call: vectors X (m, n) as rows with their images and Ritz values, ascending; their steps P."""

    def __init__(
        self,
        operator: CheckedOperator,
        wanted: Wanted,
        tol: float,
        budget: Budget,
        generator: Generator,
        *,
        block: int,
        preconditioner: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.operator = operator
        self.wanted = wanted
        self.carried = Wanted(block, wanted.which)
        # Tighter than the unit round-off cannot be met by any product.
        self.tol = max(tol, operator.epsilon)
        self.budget = budget
        self.preconditioner = preconditioner
        self.norm = 0.0
        self.X = torch.empty(block, operator.size, dtype=operator.dtype, device=operator.device)
        for index in range(block):
            self.X[index] = random_direction(operator, generator, self.X[:index])
        self.AX, self.P, self.AP = torch.empty_like(self.X), self.X[:0], self.X[:0]
        self.values: Float64Array = np.empty(0)
        self.steps = 0  # since the images were last multiplied

    def run(self) -> EigenResult:
        """Improve the block until the wanted pairs have converged or the budget is spent."""
        self.budget.allows(len(self.X))  # raises where the user asked to stop before there is anything
        try:
            self.AX = self._multiply(self.X)
        except StoppedError:
            self.budget.broken()
        self._improve(self.X, self.AX)
        for refresh in range(_REFRESHES + 1):
            finished = self._iterate()
            chosen = self._chosen()
            columns = self.X[chosen].mT
            images = self.budget.images(self.operator, columns)
            if images is None:
                floor = _ROUND_OFF * (1 + self.steps) * self.operator.epsilon * self.norm
                residuals = self._residuals()[1][chosen] + floor
                found, spent = self.values[chosen], self.budget.spent
                return bounded(columns, found, residuals, self.wanted, self._threshold, spent, "interrupted")
            result = certified(
                columns, images, self.wanted, self._threshold, self.budget.spent, self.budget.ended(finished=finished)
            )
            # On with true images where the recurrence took for converged what has not, while they make a difference.
            drifted = finished and not bool(result.converged.all()) and self.steps > 0
            if not drifted or refresh == _REFRESHES or not self.budget.allows(self.wanted.k):
                break
            self.AX[chosen] = images.mT
            self.P, self.AP, self.steps = self.P[:0], self.AP[:0], 0
            self._improve(self.X, self.AX)
        return result

    @property
    def _threshold(self) -> float:
        return self.tol * self.norm

    def _iterate(self) -> bool:
        """Take steps; return whether the wanted pairs have converged or no direction is left."""
        while True:
            residuals, lengths = self._residuals()
            order = self.carried.order(self.values)
            # Half the tolerance, since the measured residuals add round-off to those of the recurrence.
            least = max(0.5 * self.tol, _NOISE * self.operator.epsilon) * self.norm
            open_ = [int(index) for index in order if lengths[index] > least]
            if not set(open_) & set(self._chosen().tolist()):
                return True
            while open_ and not self.budget.allows(len(open_)):
                open_.pop()  # the least wanted
            if not open_:
                return False
            W = self._directions(residuals[open_] / torch.from_numpy(lengths[open_]).to(residuals)[:, None])
            if not len(W) and not len(self.P):
                return True
            try:
                AW = self._multiply(W)
            except StoppedError:
                return False
            S, AS = torch.cat([self.X, self.P, W]), torch.cat([self.AX, self.AP, AW])
            self.steps += 1
            self._improve(S, AS)

    def _chosen(self) -> Indices:
        return self.wanted.order(self.values)[: self.wanted.k]

    def _residuals(self) -> tuple[Tensor, Float64Array]:
        """A x - θ x as rows, and their norms."""
        residuals = self.AX - torch.from_numpy(self.values).to(self.X)[:, None] * self.X
        return residuals, np.array([norm(residual) for residual in residuals])

    def _directions(self, residuals: Tensor) -> Tensor:
        """Preconditioned residuals made orthonormal and orthogonal to X and P, without those that hold nothing new."""
        if self.preconditioner is not None:
            residuals = self.preconditioner(residuals.mT).mT
        basis = torch.cat([self.X, self.P, torch.empty_like(residuals)])
        first = count = len(self.X) + len(self.P)
        for residual in residuals:
            length = norm(residual)
            if count == self.operator.size or length <= 0:
                continue
            vector = residual / length
            for _ in range(3):  # until a pass changes little: what is left of a vector is as exact as it is long
                orthogonalize_(vector, basis[:count])
                share = norm(vector)
                if share <= _NEW_SHARE:
                    break
                vector /= share
                if share > 0.5:
                    basis[count] = vector
                    count += 1
                    break
        return basis[first:count].clone()

    def _multiply(self, rows: Tensor) -> Tensor:
        """Images of rows; their lengths tell of the operator's norm."""
        if not len(rows):
            return rows
        images = self.operator.matmat(rows.mT).mT.contiguous()
        self.norm = max(self.norm, *(norm(image) for image in images))
        self.budget.count(len(rows))
        return images

    def _improve(self, S: Tensor, AS: Tensor) -> None:
        """Rayleigh-Ritz on the rows of S, which are about orthonormal and begin with X: the new X, and the steps to it.

        All is relative to the measured Gram matrix, so that round-off in X and P does not add up over the steps.
        """
        held = len(self.X)
        factor = np.linalg.cholesky(inner_products(S.mT, S.mT))
        inverse = np.linalg.inv(factor)
        projection = inverse @ inner_products(S.mT, AS.mT) @ inverse.T
        check_symmetric(self.operator, projection, projection.T, self.norm)
        values, coordinates = np.linalg.eigh((projection + projection.T) / 2)
        self.norm = max(self.norm, float(np.abs(values).max()))
        chosen = np.sort(self.carried.order(values)[: self.carried.k])
        turned = coordinates[:, chosen]
        # What a pair gained: its coordinates beyond the old X.
        gained = inverse.T @ turned
        gained[:held] = 0.0
        steps = _complement(turned, factor.T @ gained)
        self.values = values[chosen]
        self.X, self.AX = _combined(inverse.T @ turned, S, AS)
        self.P, self.AP = _combined(inverse.T @ steps, S, AS)


def _combined(coordinates: Float64Array, S: Tensor, AS: Tensor) -> tuple[Tensor, Tensor]:
    turn = torch.from_numpy(np.ascontiguousarray(coordinates.T)).to(S)
    return turn @ S, turn @ AS


def _complement(basis: Float64Array, columns: Float64Array) -> Float64Array:
    """Orthonormal columns that span what others hold beyond an orthonormal basis."""
    taken = basis
    for column in columns.T:
        length = np.linalg.norm(column)
        if length <= 10 * np.finfo(np.float64).eps:
            continue
        vector = column / length
        for _ in range(3):
            vector = vector - taken @ (taken.T @ vector)
            share = np.linalg.norm(vector)
            if share <= _NEW_STEP:
                break
            vector /= share
            if share > 0.5:
                taken = np.column_stack([taken, vector])
                break
    return taken[:, basis.shape[1] :]
