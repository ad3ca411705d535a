"""The trust-region subproblem by conjugate gradients: Newton-type steps that never form a matrix.

Sources: Steihaug, "The conjugate gradient method and trust regions in large scale optimization" (SIAM J. Numer. Anal.
20, 1983); Toint, "Towards an efficient sparsity exploiting Newton method for minimization" (1981); with a
preconditioner as in Conn, Gould & Toint, "Trust-Region Methods" (2000), section 7.5.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kronfac.linalg.lanczos import norm
from kronfac.linalg.solve import Preconditioner, System, check_preconditioner, dot
from kronfac.linalg.symmetric import SymmetricOperator

TrustRegionStatus: TypeAlias = Literal["interior", "boundary", "negative_curvature", "iteration_limit"]
"""Why the solver stopped; steps of "boundary" and "negative_curvature" end on the boundary of the trust region."""


@dataclass(frozen=True, eq=False)
class TrustRegionResult:
    """An approximate minimiser of gᵀs + ½ sᵀHs in a ball.

    Attributes:
        step: s (n,).
        status: why the solver stopped: the tolerance was met within the ball ("interior"), conjugate gradients left the
            ball ("boundary") or met pᵀHp <= 0 and followed p to the boundary ("negative_curvature"), or were cut off
            within the ball ("iteration_limit").
        norm: ‖s‖; with a preconditioner M⁻¹ it is √(sᵀMs).
        radius: of the ball, in the same norm.
        model_decrease: -(gᵀs + ½ sᵀHs), by recurrence; 0 for g = 0, else positive.
        residual: ‖g + Hs‖ / ‖g‖ of the last iterate within the ball, by recurrence; 0 for g = 0.
        iterations: of conjugate gradients.
        products: products with H that were spent.
        direction: for "negative_curvature" a vector p (n,) with pᵀHp <= 0, else None.
    """

    step: Tensor
    status: TrustRegionStatus
    norm: float
    radius: float
    model_decrease: float
    residual: float
    iterations: int
    products: int
    direction: Tensor | None = None
    _pieces: tuple[_Piece, ...] = field(default=(), repr=False)

    @property
    def at_boundary(self) -> bool:
        """Whether the step ends on the boundary of the ball."""
        return self.status in ("boundary", "negative_curvature")

    def shortened(self, radius: float) -> TrustRegionResult | None:
        """The result for a smaller ball, without a product.

        Conjugate gradients take the same path whatever the radius, which only says where to leave it.

        Args:
            radius: > 0.

        Returns:
            What `trust_region_cg` would return for this radius, with `products` 0. None where the path leaves the ball
            in a part that was not kept (argument `keep`) or beyond the end of this step: then solve again.

        Raises:
            TypeError: radius is not a number.
            ValueError: it is not a finite number greater than 0.
        """
        radius = _check_radius(radius, "kronfac.linalg.TrustRegionResult.shortened")
        if radius > self.norm and not self.at_boundary:
            return replace(self, radius=radius, products=0)
        for piece in reversed(self._pieces):
            if piece.start_norm < radius <= piece.end_norm:
                step, decrease = piece.cut(radius)
                same = self.status == "negative_curvature" and piece.iteration == self.iterations
                return TrustRegionResult(
                    step=step,
                    status="negative_curvature" if same else "boundary",
                    norm=radius,
                    radius=radius,
                    model_decrease=decrease,
                    residual=piece.residual,
                    iterations=piece.iteration,
                    products=0,
                    direction=self.direction if same else None,
                    _pieces=tuple(earlier for earlier in self._pieces if earlier.iteration <= piece.iteration),
                )
        return None


@dataclass(frozen=True, eq=False)
class _Piece:
    """A straight piece s + t·(e - s), 0 <= t <= 1, of the path of conjugate gradients.

    Attributes:
        start: s (n,), None for the origin.
        end: e (n,).
        start_norm: ‖s‖_M.
        end_norm: ‖e‖_M.
        iteration: of conjugate gradients, from 1.
        residual: ‖g + Hs‖ / ‖g‖.
        unit: length that `square` and `slope` are measured in.
        square: ‖e - s‖²_M.
        slope: sᵀM(e - s).
        decrease: -q(s).
        gain: derivative of -q by t at s.
        curvature: second derivative of q by t.
    """

    start: Tensor | None
    end: Tensor
    start_norm: float
    end_norm: float
    iteration: int
    residual: float
    unit: float
    square: float
    slope: float
    decrease: float
    gain: float
    curvature: float

    def cut(self, radius: float) -> tuple[Tensor, float]:
        """The point at a distance from the origin that the piece passes, and -q there."""
        t = min(_crossing(self.square, self.slope, self.start_norm / self.unit, radius / self.unit), 1.0)
        step = self.end * t if self.start is None else self.start.lerp(self.end, t)
        return step, self.decrease + t * (self.gain - 0.5 * t * self.curvature)


def trust_region_cg(
    op: SymmetricOperator,
    gradient: Tensor,
    radius: float,
    *,
    tolerance: float | None = None,
    max_iterations: int = 250,
    preconditioner: Preconditioner | None = None,
    keep: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> TrustRegionResult:
    """Minimise gᵀs + ½ sᵀHs over ‖s‖ <= radius approximately, by Steihaug-Toint conjugate gradients.

    The model decreases at least as far as by the best multiple of -g (of -M⁻¹g) in the ball, whatever H is; for a
    positive semidefinite H at least half as far as the true minimiser gets (Yuan, Math. Program. 87, 2000).

    Args:
        op: H (n, n), symmetric, possibly indefinite.
        gradient: g (n,), of the operator's type and device.
        radius: > 0, of the trust region.
        tolerance: on ‖g + Hs‖ / ‖g‖, > 0; None for min(½, √‖g‖), which makes Newton's method converge superlinearly.
        max_iterations: most iterations, each for one product.
        preconditioner: M⁻¹, for example a K-FAC inverse. The ball is then that of the norm √(sᵀMs). M itself is never
            applied.
        keep: how many of the last iterates to keep for `TrustRegionResult.shortened`, n numbers each. A step that is
            rejected then costs no products for its smaller radius, unless it left that ball before these iterates.
        progress: called as progress(iterations, relative residual).

    Returns:
        The step with its status.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, an option out of range, a preconditioner that is not positive definite, a
            value that is not finite.
    """
    caller = "kronfac.linalg.trust_region_cg"
    system = System.check(
        op, gradient, 0.0, 1.0 if tolerance is None else tolerance, max_iterations, caller, "gradient"
    )
    radius = _check_radius(radius, caller)
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"{caller}: keep: expected an integer, got {keep!r}")
    if keep < 0:
        raise ValueError(f"{caller}: keep: expected at least 0, got {keep}")
    apply = None if preconditioner is None else check_preconditioner(preconditioner, system)
    length = system.length
    s = torch.zeros_like(system.b)
    if length <= 0:
        return TrustRegionResult(s, "interior", 0.0, radius, 0.0, 0.0, 0, 0)
    # Below the square of the round-off the recurrence says nothing, and squares of float32 numbers vanish.
    target = max(min(0.5, math.sqrt(length)) if tolerance is None else tolerance, system.op.epsilon**2)
    # From here on in units of ‖g‖, which is linear in s: squares of a tiny gradient would vanish.
    limit = radius / length
    r = system.b / length
    z = r if apply is None else apply(r)
    rz = system.positive(r, z)
    p = -z
    Mp = p if apply is None else -r
    s_norm, decrease, residual = 0.0, 0.0, 1.0
    pieces: deque[_Piece] = deque(maxlen=keep)
    status: TrustRegionStatus = "iteration_limit"
    iteration = 0
    while iteration < system.limit:
        iteration += 1
        Hp = system.multiply(p)
        curvature = dot(p, Hp)
        square, slope = dot(p, Mp), dot(s, Mp) / length
        if not square > 0:
            raise ValueError(f"{caller}: preconditioner: expected a positive definite one, got pᵀMp = {square:.3g}")
        alpha = tau = _crossing(square, slope, s_norm, limit)
        if curvature <= 0:
            status = "negative_curvature"
        elif rz / curvature >= tau:
            status = "boundary"
        else:
            alpha = rz / curvature
        before = s
        if keep:
            s = before.add(p, alpha=alpha * length)
        else:
            s.add_(p, alpha=alpha * length)
        left = status != "iteration_limit"
        after = limit if left else math.sqrt(s_norm**2 + alpha * (2 * slope + alpha * square))
        if keep:
            pieces.append(
                _Piece(
                    start=None if iteration == 1 else before,
                    end=s,
                    start_norm=s_norm * length,
                    end_norm=radius if left else after * length,
                    iteration=iteration,
                    residual=residual,
                    unit=length,
                    square=alpha**2 * square,
                    slope=alpha * slope,
                    decrease=decrease * length**2,
                    gain=alpha * rz * length**2,
                    curvature=alpha**2 * curvature * length**2,
                )
            )
        # The sum of these gains stays right where -gᵀs - ½ sᵀHs cancels (Strakoš & Tichý, ETNA 13, 2002).
        decrease += alpha * (rz - 0.5 * alpha * curvature)
        s_norm = after
        if left:
            break
        r = r.add(Hp, alpha=alpha)
        residual = norm(r)
        if progress is not None:
            progress(iteration, residual)
        if residual <= target:
            status = "interior"
            break
        z = r if apply is None else apply(r)
        following = system.positive(r, z)
        beta = following / rz
        p = (p * beta).sub_(z)
        # Mp follows p without M: no orthogonality is taken for granted, which rounding would spoil.
        Mp = p if apply is None else (Mp * beta).sub_(r)
        rz = following
    return TrustRegionResult(
        step=s,
        status=status,
        norm=radius if left else s_norm * length,
        radius=radius,
        model_decrease=decrease * length**2,
        residual=residual,
        iterations=iteration,
        products=system.products,
        direction=p if status == "negative_curvature" else None,
        _pieces=tuple(pieces),
    )


def _crossing(square: float, slope: float, length: float, radius: float) -> float:
    """The τ >= 0 at which s + τp leaves the ball: of ‖p‖², sᵀp, ‖s‖ <= radius, and the radius.

    Of the two formulas for the root of ‖p‖²τ² + 2(sᵀp)τ + ‖s‖² - radius² the one that does not cancel.
    """
    deficit = (length - radius) * (length + radius)
    root = math.sqrt(max(slope * slope - square * deficit, 0.0))
    return -deficit / (slope + root) if slope > 0 else (root - slope) / square


def _check_radius(radius: Any, caller: str) -> float:
    if isinstance(radius, bool) or not isinstance(radius, int | float):
        raise TypeError(f"{caller}: radius: expected a number, got {radius!r}")
    if not math.isfinite(radius) or radius <= 0:
        raise ValueError(f"{caller}: radius: expected a finite number greater than 0, got {radius!r}")
    return float(radius)
