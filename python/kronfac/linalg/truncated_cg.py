"""Conjugate gradients on a damped quadratic model, cut off where they gain little: the inner solver of Hessian-free.

Source: Martens, "Deep learning via Hessian-free optimization" (ICML 2010), sections 4.4, 4.5 and 4.7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kronfac.linalg.lanczos import norm
from kronfac.linalg.solve import Preconditioner, System, check_preconditioner, dot
from kronfac.linalg.symmetric import SymmetricOperator

TruncatedStatus: TypeAlias = Literal["converged", "little_progress", "nonpositive_curvature", "iteration_limit"]
"""Why the solver stopped. "converged": the tolerance or the round-off was met."""


@dataclass(frozen=True, eq=False)
class Iterate:
    """A point on the way.

    Attributes:
        step: s (n,).
        iteration: after which it was, 0 for the start.
        slope: gᵀs.
        curvature: sᵀAs, without the damping.
    """

    step: Tensor
    iteration: int
    slope: float
    curvature: float

    @property
    def model_decrease(self) -> float:
        """-(gᵀs + ½ sᵀAs): of the model without the damping, at least that of the damped one."""
        return -self.slope - 0.5 * self.curvature


@dataclass(frozen=True, eq=False)
class TruncatedResult:
    """An approximate minimiser of gᵀs + ½ sᵀ(A + shift)s, and points on the way to it.

    Attributes:
        iterates: in their order, the last one being the solution; the model decreases from each to the next, and below
            its value at 0. Empty where conjugate gradients could not begin: for g = 0, or where the first direction is
            one of non-positive curvature.
        status: why the solver stopped.
        residual: ‖g + (A + shift)s‖ / ‖g‖ of the last iterate, by recurrence; 0 for g = 0.
        iterations: of conjugate gradients.
        products: products with A that were spent.
        warm: whether it began at `start`.
        direction: for "nonpositive_curvature" a vector p (n,) with pᵀ(A + shift)p <= 0, else None.
        rayleigh: pᵀAp / pᵀp of that direction, 0 without one.
    """

    iterates: tuple[Iterate, ...]
    status: TruncatedStatus
    residual: float
    iterations: int
    products: int
    warm: bool
    direction: Tensor | None = None
    rayleigh: float = 0.0


def truncated_cg(
    op: SymmetricOperator,
    gradient: Tensor,
    *,
    shift: float = 0.0,
    start: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int = 250,
    preconditioner: Preconditioner | None = None,
    keep: bool = False,
) -> TruncatedResult:
    """Minimise φ(s) = gᵀs + ½ sᵀ(A + shift·I)s approximately by preconditioned conjugate gradients.

    Args:
        op: A (n, n), symmetric.
        gradient: g (n,), of the operator's type and device.
        shift: added to the diagonal, a damping.
        start: where to begin, at the cost of a product: there, or at the shorter multiple of it with the least φ. It is
            dropped where φ rises towards it or is not convex along it.
        tolerance: on ‖g + (A + shift)s‖ / ‖g‖, > 0. None for Martens' rule: stop at iteration i when φ fell by less
            than the share 5e-4·k of it over the last k = max(10, i/10) iterations.
        max_iterations: most iterations, each for one product.
        preconditioner: (a approximation of A + shift)⁻¹, for example a K-FAC inverse.
        keep: whether to keep iterates at iterations that grow by the factor 1.3, n numbers each.

    Returns:
        The iterates with the status.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, an option out of range, a preconditioner that is not positive definite, a
            value that is not finite.
    """
    caller = "kronfac.linalg.truncated_cg"
    system = System.check(
        op, gradient, shift, 1.0 if tolerance is None else tolerance, max_iterations, caller, "gradient"
    )
    begin = None if start is None else system.vector(start, "start")
    apply = check_preconditioner(preconditioner, system)
    length = system.length
    if length <= 0:
        return TruncatedResult((), "converged", 0.0, 0, 0, False)
    # In units of ‖g‖, which is linear in s: squares of a tiny gradient would vanish.
    g = system.b / length
    s, r, phi = torch.zeros_like(g), g.clone(), 0.0
    warm = False
    if begin is not None and norm(begin) > 0:
        scaled = begin / length
        product = system.multiply(scaled)
        slope, curvature = dot(g, scaled), dot(scaled, product)
        if curvature > 0 > slope:
            scale = min(1.0, -slope / curvature)  # the best multiple: φ is below 0 there
            s, r, warm = scaled.mul_(scale), r.add_(product, alpha=scale), True
            phi = scale * (slope + 0.5 * scale * curvature)

    iterates: list[Iterate] = []

    def store(iteration: int) -> None:
        square = dot(s, s)
        iterates.append(
            Iterate(
                step=s * length,
                iteration=iteration,
                slope=dot(g, s) * length**2,
                curvature=(dot(s, r) - dot(s, g) - system.shift * square) * length**2,
            )
        )

    # Below the round-off the recurrence only makes noise.
    target = max(system.op.epsilon, 0.0 if tolerance is None else tolerance)
    status: TruncatedStatus = "iteration_limit"
    residual = norm(r)
    values = [phi]
    direction, rayleigh = None, 0.0
    following, iteration = 1, 0
    if warm:
        store(0)
    if residual <= target:
        status = "converged"
    else:
        z = apply(r)
        rz = system.positive(r, z)
        p = -z
        while iteration < system.limit:
            Ap = system.multiply(p)
            curvature = dot(p, Ap)
            # Below the round-off of the product its sign says nothing; it is as good as singular.
            if curvature <= system.op.epsilon * norm(p) * norm(Ap):
                status, direction = "nonpositive_curvature", p
                rayleigh = curvature / dot(p, p) - system.shift
                break
            iteration += 1
            alpha = rz / curvature
            s = s.add_(p, alpha=alpha)
            r = r.add_(Ap, alpha=alpha)
            phi -= 0.5 * alpha * rz
            values.append(phi)
            residual = norm(r)
            if residual <= target:
                status = "converged"
            elif tolerance is None and _little_progress(values):
                status = "little_progress"
            if status != "iteration_limit":
                break
            if keep and iteration == following:
                store(iteration)
                following = math.ceil(_SPACING * following)
            z = apply(r)
            rz_after = system.positive(r, z)
            p = p.mul_(rz_after / rz).sub_(z)
            rz = rz_after
        if iteration and (not iterates or iterates[-1].iteration < iteration):
            store(iteration)
    return TruncatedResult(tuple(iterates), status, residual, iteration, system.products, warm, direction, rayleigh)


_SPACING = 1.3  # Martens, section 4.7
_PROGRESS = 5e-4
_WINDOW = 10


def _little_progress(values: list[float]) -> bool:
    """Martens' rule on the values of the model, the start's first."""
    iteration = len(values) - 1
    window = max(_WINDOW, math.ceil(0.1 * iteration))
    if iteration <= window or values[-1] >= 0:
        return False
    return (values[-1] - values[-1 - window]) / values[-1] < window * _PROGRESS
