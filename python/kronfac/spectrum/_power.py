"""Power iteration with deflation: one eigenpair of largest magnitude after another, with three vectors in store."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from kronfac.linalg.lanczos import check_symmetric
from kronfac.linalg.subspace import norm, random_direction
from kronfac.linalg.symmetric import CheckedOperator
from kronfac.linalg.trace import StoppedError
from kronfac.ops import orthogonalize_
from kronfac.spectrum._budget import Budget
from kronfac.spectrum._certificate import certified
from kronfac.spectrum._wanted import Wanted
from kronfac.spectrum.results import EigenResult


class PowerSearch:
    """The state of one call: the pairs found so far, orthogonal to which the next one is looked for.

    The pair that is tested in every step is the best one in the span of two successive iterates, at no further product:
    where λ and -λ are eigenvalues both, the iterates themselves swing between their vectors for ever.
    """

    def __init__(
        self, operator: CheckedOperator, wanted: Wanted, tol: float, budget: Budget, generator: Generator
    ) -> None:
        self.operator = operator
        self.wanted = wanted
        # Tighter than the unit round-off cannot be met by any product.
        self.tol = max(tol, operator.epsilon)
        self.budget = budget
        self.generator = generator
        self.norm = 0.0
        self.started = 0  # pairs that have something in their place
        rows = torch.empty(2, wanted.k, operator.size, dtype=operator.dtype, device=operator.device)
        self.vectors, self.images = rows[0], rows[1]

    def run(self) -> EigenResult:
        """Find one pair after another until all have converged or the budget is spent."""
        found, finished = 0, True
        while found < self.wanted.k and finished and self.budget.allows(1):
            try:
                finished = self._find(found)
            except StoppedError:
                self.budget.broken()
                finished = False
            found = self.started
        columns = self.vectors[:found].mT
        images = self.budget.images(self.operator, columns)
        if images is None:
            images = self.images[:found].mT
        ended = self.budget.ended(finished=finished and found == self.wanted.k)
        return certified(columns, images, self.wanted, self.tol * self.norm, self.budget.spent, ended)

    def _find(self, index: int) -> bool:
        """Iterate orthogonally to the pairs before `index`; return whether the pair now there has converged."""
        vector = random_direction(self.operator, self.generator, self.vectors[:index])
        image, inside = self._multiply(vector, index)
        converged = self._keep(index, [vector], [image], [inside])
        while not converged and self.budget.allows(1):
            following = inside / norm(inside)  # not zero, or the pair would have converged
            orthogonalize_(following, self.vectors[:index])  # what round-off brings back would grow
            following /= norm(following)
            next_image, next_inside = self._multiply(following, index)
            converged = self._keep(index, [vector, following], [image, next_image], [inside, next_inside])
            vector, image, inside = following, next_image, next_inside
        return converged

    def _multiply(self, vector: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """A v and the part of it that is orthogonal to the pairs before `index`."""
        image = self.operator.matvec(vector)
        self.budget.count(1)
        inside = image.clone()
        orthogonalize_(inside, self.vectors[:index])
        return image, inside

    def _keep(self, index: int, vectors: list[Tensor], images: list[Tensor], inside: list[Tensor]) -> bool:
        """Put the best pair in the span of one or two unit vectors in its place; return whether it has converged."""
        length = 0.0
        if len(vectors) == 2:
            overlap = float((vectors[0] * vectors[1]).sum(dtype=torch.float64))
            rest = vectors[1] - overlap * vectors[0]
            length = norm(rest)
            if length <= 10 * self.operator.epsilon:
                vectors, images, inside = vectors[1:], images[1:], inside[1:]
            else:
                vectors = [vectors[0], rest / length]
                images = [images[0], (images[1] - overlap * images[0]) / length]
                inside = [inside[0], (inside[1] - overlap * inside[0]) / length]
        basis, products, deflated = (torch.stack(rows) for rows in (vectors, images, inside))
        projection = (basis.double() @ deflated.double().mT).cpu().numpy()
        if len(projection) == 2 and length >= self.operator.epsilon**0.5:  # else there is more round-off in it
            check_symmetric(self.operator, projection, projection.T, max(self.norm, float(np.abs(projection).max())))
        values, coordinates = np.linalg.eigh((projection + projection.T) / 2)
        best = int(np.abs(values).argmax())
        value = float(values[best])
        self.norm = max(self.norm, abs(value))
        turn = torch.from_numpy(coordinates[:, best].copy()).to(basis)
        self.started = index + 1
        self.vectors[index], self.images[index] = turn @ basis, turn @ products
        # Half the tolerance: a little is lost where the pairs are put together.
        return norm(turn @ deflated - value * self.vectors[index]) <= 0.5 * self.tol * self.norm
