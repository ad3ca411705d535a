"""Least squares by LSMR on any operator with a transpose, with measured residuals and an honest status."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kronfac.linalg.lanczos import norm
from kronfac.linalg.rectangular import CheckedPair, check_pair
from kronfac.linalg.solve import dot

LeastSquaresStatus: TypeAlias = Literal[
    "consistent", "least_squares", "ill_conditioned", "iteration_limit", "stagnated"
]
"""Why the solver stopped. "stagnated": round-off allows no smaller residual."""

_MEASUREMENTS = 5  # how often residuals are measured because the recurrences say that they are small enough
_PROGRESS = 0.5  # what the recurrences have to gain between two of them
# Where uᵀ(A v) and vᵀ(Aᵀ u) differ by more than this many √ε ‖A‖, no round-off explains it.
_ADJOINT = 100.0


@dataclass(frozen=True, eq=False)
class LeastSquaresResult:
    """Solution of a least-squares problem.

    Attributes:
        x: the solution (n,).
        residual: measured norm ‖b - A x‖ / ‖b‖; 0 for b = 0.
        gradient: measured norm ‖Aᵀ(b - A x) - λ x‖, relative to ‖A‖ times the norm of (b - A x, √λ x): how far x is
            from a minimum. 0 where that norm is 0.
        status: why the solver stopped: "consistent", ‖b - A x‖ is as small as asked for; "least_squares", `gradient`
            is; "ill_conditioned", the estimated condition number reached its limit; "iteration_limit"; "stagnated".
        iterations: steps that were taken.
        products: products with A and with Aᵀ that were spent, together.
        norm: estimate of the Frobenius norm of A, a lower one.
        condition: estimate of the condition number of (A, √λ I).
    """

    x: Tensor
    residual: float
    gradient: float
    status: LeastSquaresStatus
    iterations: int
    products: int
    norm: float
    condition: float

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met, of a consistent system or of a least-squares problem."""
        return self.status in ("consistent", "least_squares")


def lsmr(
    op: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    condition_limit: float | None = None,
    max_iterations: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> LeastSquaresResult:
    """Minimise ‖b - A x‖² + λ‖x‖² by LSMR (Fong & Saunders, SIAM J. Sci. Comput. 33, 2011).

    In exact arithmetic it is MINRES on (AᵀA + λI) x = Aᵀb: ‖Aᵀ(b - A x) - λ x‖ falls at every step. It never forms
    AᵀA, whose condition number is the square of A's, and of all solutions without damping it finds the shortest. Each
    step takes a product with A and one with Aᵀ, and both are compared: an operator whose transpose is wrong is refused.

    Args:
        op: A (m, n): a torch or numpy matrix, a scipy sparse matrix or LinearOperator, an operator of
            `kronfac.operators` (products of operators too), a `kronfac.linalg.MatrixFree`, or any object with `shape`,
            `@` on torch vectors, and `rmatvec(u)` or `mT`.
        b: (m,), of the operator's type and device.
        damping: λ >= 0, what a `shift` is to the solvers for symmetric systems; scipy's `damp` is its square root.
        tolerance: > 0. Stops at ‖r‖ <= tolerance·(‖A‖‖x‖ + ‖b‖), r the residual (b - A x, √λ x), or at ‖Aᵀ(b - A x) -
            λx‖ <= tolerance·‖A‖‖r‖. Both are measured before they are believed.
        condition_limit: stop where the condition number is estimated at this, > 1; default: the inverse of the unit
            round-off.
        max_iterations: default 2·max(m, n), at least 100.
        progress: called as progress(iterations, ‖r‖ / ‖b‖).

    Returns:
        The solution with its status.

    Raises:
        TypeError: an argument of the wrong type, or an operator without transpose.
        ValueError: shapes that do not fit, an option out of range, a value that is not finite, or a transpose that is
            not the operator's own.
    """
    problem = _Problem.check(op, b, damping, tolerance, condition_limit, max_iterations)
    pair, damp = problem.pair, math.sqrt(problem.damping)
    x = torch.zeros(pair.shape[1], dtype=pair.dtype, device=pair.device)
    beta = problem.length
    if beta <= 0:
        return problem.result(x, 0, 0.0, 1.0)
    # Golub & Kahan's bidiagonalisation: β u = A v - α u and α v = Aᵀu - β v. Names as in the paper.
    u = problem.b / beta
    v = pair.rmatvec(u)
    alpha = norm(v)
    if alpha <= 0:
        return problem.result(x, 0, 0.0, 1.0)
    v.div_(alpha)
    h, hbar = v.clone(), torch.zeros_like(v)
    zetabar, alphabar = alpha * beta, alpha
    rho = rhobar = cbar = 1.0
    sbar = zeta = 0.0
    residual = _ResidualNorm(beta)
    size, squared_size, condition = alpha, alpha**2, 1.0
    largest, least = 0.0, math.inf
    measured, best = 0, math.inf
    for iteration in range(1, problem.limit + 1):
        product = pair.matvec(v)
        problem.check_adjoint(dot(u, product), alpha, size, norm(product))
        u = product.sub_(u, alpha=alpha)
        beta = norm(u)
        if beta > 0:
            u.div_(beta)
            v = pair.rmatvec(u).sub_(v, alpha=beta)
            alpha = norm(v)
            if alpha > 0:
                v.div_(alpha)
        chat, shat, alphahat = _rotation(alphabar, damp)
        rhoold = rho
        c, s, rho = _rotation(alphahat, beta)
        thetanew, alphabar = s * alpha, c * alpha
        rhobarold, thetabar, rhotemp = rhobar, sbar * rho, cbar * rho
        cbar, sbar, rhobar = _rotation(rhotemp, thetanew)
        if rho <= 0 or rhobar <= 0:  # an exact zero: nothing is left to gain in this space
            return problem.result(x, iteration - 1, size, condition)
        zeta, zetabar = cbar * zetabar, -sbar * zetabar
        hbar.mul_(-thetabar * rho / (rhoold * rhobarold)).add_(h)
        x.add_(hbar, alpha=zeta / (rho * rhobar))
        h.mul_(-thetanew / rho).add_(v)

        remaining = residual.update(chat, shat, c, s, thetabar, rhobar, zeta)
        squared_size += beta**2
        size = math.sqrt(squared_size)
        squared_size += alpha**2
        largest = max(largest, rhobarold)
        if iteration > 1:
            least = min(least, rhobarold)
        condition = max(largest, rhotemp) / min(least, rhotemp)
        if progress is not None:
            progress(iteration, remaining / problem.length)

        excess = min(problem.excess(remaining, abs(zetabar), norm(x), size))
        exhausted = excess * problem.tolerance <= pair.epsilon or beta <= 0 or alpha <= 0
        if exhausted or excess <= min(1.0, _PROGRESS * best):
            # The recurrences drift from what they stand for; what is promised is the latter.
            measured, best = measured + 1, excess
            result = problem.result(x, iteration, size, condition)
            if exhausted or result.converged or measured > _MEASUREMENTS:
                return result
        if condition >= problem.condition_limit:
            return problem.result(x, iteration, size, condition, "ill_conditioned")
    return problem.result(x, problem.limit, size, condition, "iteration_limit")


class _ResidualNorm:
    """‖(b - A x, √λ x)‖ from the rotations alone: section 5 of the paper.

    Args:
        beta: ‖b‖.
    """

    def __init__(self, beta: float) -> None:
        self._betadd, self._betad = beta, 0.0
        self._rhod, self._tautilde, self._thetatilde = 1.0, 0.0, 0.0
        self._zeta, self._squares = 0.0, 0.0

    def update(
        self, chat: float, shat: float, c: float, s: float, thetabar: float, rhobar: float, zeta: float
    ) -> float:
        """Follow one step; its quantities by their names in the paper."""
        betaacute, betacheck = chat * self._betadd, -shat * self._betadd
        betahat, self._betadd = c * betaacute, -s * betaacute
        thetatilde_old = self._thetatilde
        ctilde, stilde, rhotilde = _rotation(self._rhod, thetabar)
        self._thetatilde, self._rhod = stilde * rhobar, ctilde * rhobar
        self._betad = -stilde * self._betad + ctilde * betahat
        self._tautilde = (self._zeta - thetatilde_old * self._tautilde) / rhotilde
        taud = (zeta - self._thetatilde * self._tautilde) / self._rhod
        self._zeta = zeta
        self._squares += betacheck**2
        return math.sqrt(self._squares + (self._betad - taud) ** 2 + self._betadd**2)


@dataclass
class _Problem:
    """A checked least-squares problem.

    Attributes:
        pair: A and Aᵀ.
        b: right side (m,).
        length: ‖b‖.
        damping: λ.
        tolerance: of both rules.
        condition_limit: where to stop.
        limit: most iterations.
    """

    pair: CheckedPair
    b: Tensor
    length: float
    damping: float
    tolerance: float
    condition_limit: float
    limit: int

    @classmethod
    def check(
        cls, op: Any, b: Any, damping: Any, tolerance: Any, condition_limit: Any, max_iterations: Any
    ) -> _Problem:
        """Check all arguments."""
        pair = check_pair(op, _CALLER)
        damping = _check_number(damping, "damping", 0.0)
        tolerance = _check_number(tolerance, "tolerance", 0.0, above=True)
        limit = 1 / pair.epsilon if condition_limit is None else _check_number(condition_limit, "condition_limit", 1.0)
        if max_iterations is not None and (isinstance(max_iterations, bool) or not isinstance(max_iterations, int)):
            raise TypeError(f"{_CALLER}: max_iterations: expected an integer or None, got {max_iterations!r}")
        if max_iterations is not None and max_iterations < 1:
            raise ValueError(f"{_CALLER}: max_iterations: expected at least 1, got {max_iterations}")
        if not isinstance(b, Tensor):
            raise TypeError(f"{_CALLER}: b: expected a tensor, got {type(b).__name__}")
        if b.dtype != pair.dtype:
            raise TypeError(f"{_CALLER}: b: expected {pair.dtype}, got {b.dtype}")
        if tuple(b.shape) != (pair.shape[0],) or b.device != pair.device:
            raise ValueError(
                f"{_CALLER}: b: expected shape ({pair.shape[0]},) on {pair.device}, got {tuple(b.shape)} on {b.device}"
            )
        if not bool(b.isfinite().all()):
            raise ValueError(f"{_CALLER}: b: expected finite values, got NaN or infinity")
        steps = max(2 * max(pair.shape), 100) if max_iterations is None else max_iterations
        return cls(pair, b.detach(), norm(b.detach()), damping, tolerance, limit, steps)

    def excess(self, residual: float, gradient: float, x_norm: float, size: float) -> tuple[float, float]:
        """How many times each of the two rules' limits is taken up: at most 1 where it is met."""
        limits = self.tolerance * (size * x_norm + self.length), self.tolerance * size * residual
        return tuple(  # type: ignore[return-value]
            value / limit if limit > 0 else 0.0 if value <= 0 else math.inf
            for value, limit in zip((residual, gradient), limits, strict=True)
        )

    def check_adjoint(self, measured: float, alpha: float, size: float, image: float) -> None:
        """Compare uᵀ(A v) with α = vᵀ(Aᵀu), which the bidiagonalisation has.

        Args:
            measured: uᵀ(A v).
            alpha: α.
            size: the estimate of ‖A‖ so far, α itself at first.
            image: ‖A v‖.

        Raises:
            ValueError: they differ by more than round-off can explain.
        """
        root = self.pair.epsilon**0.5
        # A tiny α is what cancellation has left, and v then has no right direction.
        if alpha > root * size and abs(measured - alpha) > _ADJOINT * root * max(size, image):
            raise ValueError(
                f"{_CALLER}: op: the transpose is not that of the operator: uᵀ(A v) = {measured:.6g} but vᵀ(Aᵀ u) = "
                f"{alpha:.6g}; check rmatvec or mT (a random operator looks like this, too)"
            )

    def result(
        self, x: Tensor, iterations: int, size: float, condition: float, otherwise: LeastSquaresStatus = "stagnated"
    ) -> LeastSquaresResult:
        """The result with everything measured; `otherwise` is its status where neither rule is met."""
        status: LeastSquaresStatus = otherwise
        if self.length <= 0:
            return LeastSquaresResult(x, 0.0, 0.0, "consistent", iterations, self.pair.products, size, condition)
        x_norm = norm(x)
        r = self.b - self.pair.matvec(x) if x_norm else self.b
        slope = self.pair.rmatvec(r).sub_(x, alpha=self.damping)
        plain, gradient = norm(r), norm(slope)
        whole = math.hypot(plain, math.sqrt(self.damping) * x_norm)
        solved, stationary = self.excess(whole, gradient, x_norm, size)
        if stationary <= 1:
            status = "least_squares"
        if solved <= 1:
            status = "consistent"
        scale = size * whole
        relative = gradient / scale if scale > 0 else 0.0
        return LeastSquaresResult(
            x, plain / self.length, relative, status, iterations, self.pair.products, size, condition
        )


def _check_number(value: Any, name: str, least: float, *, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_CALLER}: {name}: expected a number, got {value!r}")
    if not math.isfinite(value) or value < least or (above and value <= least):
        bound = f"greater than {least:g}" if above else f"of at least {least:g}"
        raise ValueError(f"{_CALLER}: {name}: expected a finite number {bound}, got {value!r}")
    return float(value)


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """Cosine, sine and radius of the plane rotation that takes (a, b) to (radius, 0)."""
    radius = math.hypot(a, b)
    return (a / radius, b / radius, radius) if radius > 0 else (0.0, 0.0, 0.0)


_CALLER = "kronfac.linalg.lsmr"
