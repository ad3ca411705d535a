"""The recurrences of MINRES, shared by the solvers that stop it in different ways."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kronfac.linalg.lanczos import norm
from kronfac.linalg.solve import System, dot
from kronfac.linalg.subspace import BREAKDOWN
from kronfac.ops import orthogonalize_


class MinresRecurrence:
    """Lanczos and the QR factorisation of its tridiagonal T, column by column.

    `look` spends one product, after which `curvature` and `change` belong to the present `x`; `take` then moves x to
    the least residual over the larger Krylov space (Paige & Saunders, SIAM J. Numer. Anal. 12, 1975). With A the
    system's matrix, shift included, T = QR gives for the residual r = b - A x before step k, of length φ,

        rᵀA r / φ² = -c γ    and    ‖A r‖ = φ √(γ² + δ²),

    γ and δ the entries of R's next column before its own reflection, c the cosine of the reflection before it (Liu &
    Roosta, SIAM J. Optim. 32, 2022, lemma 3.1).

    With a preconditioner P = M⁻¹, positive definite, it is MINRES on P^½ A P^½ ŷ = P^½ b with x = P^½ ŷ: residuals are
    least in ‖r‖_P = √(rᵀP r), the direction that is tested is P r, and ‖·‖_P takes the place of ‖·‖ above.

    Args:
        system: the checked system; b is not 0.
        apply: P as a function, None for the identity.
        capacity: how many Lanczos vectors are kept, each new one being orthogonalised against all; 0 for none.

    Attributes:
        x: the solution so far.
        direction: P r, r the residual of x.
        length: ‖b‖_P.
        residual: φ = ‖r‖_P in exact arithmetic.
        iteration: calls of `look`.
        curvature: (P r)ᵀA(P r) / ‖r‖_P², after `look`.
        change: ‖A P r‖_P, after `look`.
        largest: ‖T‖, about ‖A‖ on the Krylov space.
        exhausted: the Krylov space is invariant: x is the least-squares solution after the next `take`.
    """

    def __init__(self, system: System, apply: Callable[[Tensor], Tensor] | None = None, capacity: int = 0) -> None:
        self._system = system
        self._apply = apply
        b = system.b
        start = b if apply is None else apply(b)
        self.length = system.length if apply is None else math.sqrt(system.positive(b, start))
        self.x = torch.zeros_like(b)
        self.direction = start.clone()
        self.residual = self._beta = self.length
        # v are the Lanczos vectors, y = P v: orthonormal is vᵢᵀyⱼ
        self._v = b / self._beta
        self._y = self._v if apply is None else start / self._beta
        self._v_before = torch.zeros_like(b)
        self._w, self._w_before = torch.zeros_like(b), torch.zeros_like(b)
        self._basis = torch.empty(capacity, len(b), dtype=b.dtype, device=b.device)
        self._images = self._basis if apply is None else torch.empty_like(self._basis)
        # the last reflection (c, s), and what it left of the next column
        self._c, self._s, self._delta, self._epsilon = -1.0, 0.0, 0.0, 0.0
        self._epsilon_next = self._delta_two = self._gamma = self._following = 0.0
        self._q = self._z = b
        self.iteration = 0
        self.largest = 0.0
        self.curvature, self.change = math.inf, math.inf
        self.exhausted = False
        self._step = 0.0
        self._least = math.inf

    @property
    def negligible(self) -> float:
        """What the entries of T, and with them `curvature`, are off by: below it is round-off."""
        return BREAKDOWN * self._system.op.epsilon * self.largest

    @property
    def unresolved(self) -> float:
        """A length of the residual at which it is made of rounding errors."""
        return BREAKDOWN * self._system.op.epsilon * self.length

    def look(self) -> None:
        """Multiply with the next Lanczos vector, which tells the curvature along the residual.

        Raises:
            ValueError: the product is not finite, or the preconditioner is not positive definite.
        """
        self.iteration += 1
        q = self._system.multiply(self._y)
        if self.iteration > 1:
            q.sub_(self._v_before, alpha=self._beta)
        alpha = dot(self._y, q)
        q.sub_(self._v, alpha=alpha)
        self._orthogonalise(q)
        z = q if self._apply is None else self._apply(q)
        following = self._length(q, z)
        self.largest = max(self.largest, math.hypot(alpha, following, self._beta if self.iteration > 1 else 0.0))
        if following <= self.negligible:
            following = 0.0  # an invariant subspace: x is exact on it
        self.exhausted = not following
        self._delta_two = self._c * self._delta + self._s * alpha
        self._gamma = self._s * self._delta - self._c * alpha
        self._epsilon_next = self._s * following
        self._delta = -self._c * following
        self.curvature = -self._c * self._gamma
        self.change = self.residual * math.hypot(self._gamma, self._delta)
        self._q, self._z, self._following = q, z, following

    def take(self) -> bool:
        """Move x on, and the residual with it.

        Returns:
            False where that cannot be: A r = 0, x is the least-squares solution already.
        """
        gamma = math.hypot(self._gamma, self._following)
        if gamma <= self.negligible:
            return False
        self._c, self._s = self._gamma / gamma, self._following / gamma
        w = (self._y - self._delta_two * self._w - self._epsilon * self._w_before) / gamma
        self._step = self._c * self.residual
        self.x.add_(w, alpha=self._step)
        self.residual *= self._s
        self._w_before, self._w = self._w, w
        self._epsilon = self._epsilon_next
        if self._following:
            self._v_before, self._v = self._v, self._q / self._following
            self._y = self._v if self._apply is None else self._z / self._following
            self.direction = self._s * self._s * self.direction - self.residual * self._c * self._y
            self._beta = self._following
        return True

    def diverged(self) -> bool:
        """Whether ‖A r‖ grows again: past the least-squares solution round-off grows in the null space.

        x is then taken back by a step.
        """
        self._least = min(self._least, self.change)
        if self.change <= _DIVERGED * self._least:
            return False
        self.x.sub_(self._w, alpha=self._step)
        return True

    def solves(self, tolerance: float) -> bool:
        """Whether ‖A r‖ <= tolerance·‖A x‖, in the lengths of P; A x and r are orthogonal there."""
        share = self.residual / self.length
        return self.change <= tolerance * self.length * math.sqrt(max(1.0 - share * share, 0.0))

    def _orthogonalise(self, q: Tensor) -> None:
        if not len(self._basis):
            return
        rows = slice(0, self.iteration)
        self._basis[self.iteration - 1].copy_(self._v)
        if self._apply is None:
            orthogonalize_(q, self._basis[rows])
            return
        self._images[self.iteration - 1].copy_(self._y)
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            q.sub_(self._basis[rows].mT @ (self._images[rows] @ q))

    def _length(self, q: Tensor, z: Tensor) -> float:
        if z is q:
            return norm(q)
        square = dot(q, z)
        # Of a remainder that is all round-off the sign says nothing.
        if square < -BREAKDOWN * self._system.op.epsilon * norm(q) * norm(z):
            self._system.positive(q, z)
        return math.sqrt(max(square, 0.0))


_DIVERGED = 100.0
