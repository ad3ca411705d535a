"""MINRES with a watch on the curvature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kronfac.linalg.minres_recurrence import MinresRecurrence
from kronfac.linalg.solve import SolveResult, Status, System
from kronfac.linalg.symmetric import SymmetricOperator


def minres(
    op: SymmetricOperator,
    b: Tensor,
    *,
    shift: float = 0.0,
    tolerance: float = 1e-6,
    relative_to: str = "b",
    stop_at_nonpositive_curvature: bool = False,
    reorthogonalize: bool = False,
    max_iterations: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> SolveResult:
    """Minimise ‖b - (A + shift·I) x‖ over growing Krylov spaces (Paige & Saunders 1975); A may be indefinite.

    Every residual r is tested for rᵀ(A + shift)r <= 0 at no cost (Liu & Roosta, SIAM J. Optim. 32, 2022, algorithm 1):
    the first that passes is a direction of non-positive curvature.

    Args:
        op: A (n, n), symmetric.
        b: (n,), of the operator's type and device.
        shift: added to the diagonal.
        tolerance: > 0, on the residual.
        relative_to: "b": ‖r‖ <= tolerance·‖b‖. "solution": ‖(A + shift) r‖ <= tolerance·‖(A + shift) x‖, the rule of
            inexact Newton methods (Liu & Roosta), which an inconsistent system meets too.
        stop_at_nonpositive_curvature: return at the first such direction, with x as before it.
        reorthogonalize: keep the Lanczos vectors, iterations x n of them, and orthogonalise each against all: the test
            is then that of exact arithmetic.
        max_iterations: default 2n, at least 100.
        progress: called as progress(iterations, relative residual).

    Returns:
        The solution with its status; `direction` is set only with `stop_at_nonpositive_curvature`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, an option out of range, a value that is not finite.
    """
    system = System.check(op, b, shift, tolerance, max_iterations, "kronfac.linalg.minres")
    if relative_to not in ("b", "solution"):
        raise ValueError(f"{system.caller}: relative_to: expected 'b' or 'solution', got {relative_to!r}")
    if system.length <= 0:
        return system.result(torch.zeros_like(system.b), "converged", 0)
    limit = min(system.limit, system.op.size) if reorthogonalize else system.limit
    state = MinresRecurrence(system, capacity=limit if reorthogonalize else 0)
    status: Status = "iteration_limit"
    while state.iteration < limit:
        state.look()
        if stop_at_nonpositive_curvature and state.curvature <= state.negligible:
            return system.result(state.x, "nonpositive_curvature", state.iteration, direction=state.direction)
        if relative_to == "solution":
            if state.solves(tolerance):
                status = "converged"
                break
            if state.diverged():
                status = "stagnated"
                break
        if not state.take():
            status = "converged" if relative_to == "solution" else "stagnated"
            break
        if progress is not None:
            progress(state.iteration, state.residual / system.length)
        if state.exhausted or (relative_to == "b" and state.residual <= tolerance * system.length):
            status = "converged"
            break
    result = system.result(state.x, status, state.iteration)
    if relative_to == "b" and (status == "converged") != (result.residual <= tolerance):
        # Rounding has the last word: φ is what the residual would be in exact arithmetic.
        status = "converged" if result.residual <= tolerance else "stagnated"
        result = SolveResult(state.x, result.residual, status, state.iteration, system.products)
    return result
