"""The direction of a Newton-MINRES step: a Newton step as far as the curvature is positive, else a way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kronfac.linalg.lanczos import norm
from kronfac.linalg.minres_recurrence import MinresRecurrence
from kronfac.linalg.solve import Preconditioner, Status, System, check_preconditioner
from kronfac.linalg.symmetric import SymmetricOperator

DirectionKind: TypeAlias = Literal["solution", "nonpositive"]
"""A Newton step s, or a residual r with rᵀHr <= 0."""


@dataclass(frozen=True, eq=False)
class NewtonMinresResult:
    """A direction of descent for the quadratic model gᵀs + ½ sᵀHs.

    Attributes:
        direction: d (n,), with gᵀd < 0 (0 where g = 0).
        kind: "solution": d = s, about -H⁻¹g. "nonpositive": d = r, a residual -(g + Hs) with rᵀHr <= 0.
        status: why the solver stopped: "converged" (‖Hr‖ <= tolerance·‖Hs‖), "nonpositive_curvature",
            "iteration_limit" (s is still a direction of descent), "stagnated" (round-off allows no more).
        iterations: steps that were taken, the one that found `kind` included.
        products: products with H that were spent: one for each iteration.
        curvature: rᵀHr / rᵀr of the last residual that was tested; inf for g = 0. With a preconditioner P the
            direction tested is P r, and the denominator rᵀP r.
        residual: ‖r‖ / ‖g‖ of d = s, or of the s that belongs to d = r; with a preconditioner in √(rᵀP r).
    """

    direction: Tensor
    kind: DirectionKind
    status: Status
    iterations: int
    products: int
    curvature: float
    residual: float


def newton_minres(
    op: SymmetricOperator,
    gradient: Tensor,
    *,
    shift: float = 0.0,
    tolerance: float = 0.01,
    preconditioner: Preconditioner | None = None,
    reorthogonalize: bool = False,
    max_iterations: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> NewtonMinresResult:
    """MINRES on H s = -g, with a test of every residual r for rᵀHr <= 0 (Liu & Roosta, SIAM J. Optim. 32, 2022).

    The first residual that passes is returned: a direction of non-positive curvature, and of descent, as
    gᵀr = -‖r‖². Otherwise the solver stops at ‖Hr‖ <= tolerance·‖Hs‖, a rule that singular and inconsistent systems
    meet too, and returns s, for which 0 < sᵀHs <= -gᵀs. Both tests come from the recurrences, without a product of
    their own. A curvature within round-off of 0 counts as 0, thus as non-positive.

    Args:
        op: H (n, n), symmetric; indefinite or singular as it may be.
        gradient: g (n,), of the operator's type and device.
        shift: added to the diagonal of H.
        tolerance: η > 0, on ‖Hr‖ / ‖Hs‖.
        preconditioner: P = M⁻¹, positive definite, for example a K-FAC inverse. Lengths are then √(rᵀP r), and the
            direction that is tested for (P r)ᵀH(P r) <= 0, and returned, is P r.
        reorthogonalize: keep the Lanczos vectors, iterations x n of them (twice that with a preconditioner), and
            orthogonalise each against all: the test is then that of exact arithmetic. Without, a direction of
            non-positive curvature may be seen some iterations late, but none is where there is none.
        max_iterations: default 2n, at least 100.
        progress: called as progress(iterations, ‖r‖ / ‖g‖).

    Returns:
        The direction with its kind.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, an option out of range, a preconditioner that is not positive definite, a
            value that is not finite.
    """
    caller = "kronfac.linalg.newton_minres"
    system = System.check(op, gradient, shift, tolerance, max_iterations, caller, name_of_b="gradient")
    apply = None if preconditioner is None else check_preconditioner(preconditioner, system)
    if system.length <= 0:
        zero = torch.zeros_like(system.b)
        return NewtonMinresResult(zero, "solution", "converged", 0, 0, float("inf"), 0.0)
    # In units of ‖g‖, in which d is linear: squares of a tiny gradient would vanish.
    length = system.length
    system.b = system.b / -length
    system.length = norm(system.b)
    limit = min(system.limit, system.op.size) if reorthogonalize else system.limit
    state = MinresRecurrence(system, apply, capacity=limit if reorthogonalize else 0)
    status: Status = "iteration_limit"
    while state.iteration < limit:
        state.look()
        if state.curvature <= state.negligible:
            status = "nonpositive_curvature"
            break
        if state.solves(tolerance):
            status = "converged"
            break
        if state.diverged():
            status = "stagnated"
            break
        state.take()
        if progress is not None:
            progress(state.iteration, state.residual / state.length)
        # Below round-off of b the curvature along the residual is that of rounding errors.
        if state.exhausted or state.residual <= state.unresolved:
            status = "converged"
            break
    found = status == "nonpositive_curvature"
    return NewtonMinresResult(
        (state.direction if found else state.x) * length,
        "nonpositive" if found else "solution",
        status,
        state.iteration,
        system.products,
        state.curvature,
        state.residual / state.length,
    )
