"""MINRES with a watch on the curvature."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kronfac.linalg.lanczos import norm
from kronfac.linalg.solve import SolveResult, Status, System, dot
from kronfac.linalg.symmetric import SymmetricOperator
from kronfac.ops import orthogonalize_


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
    x = torch.zeros_like(system.b)
    if system.length <= 0:
        return system.result(x, "converged", 0)
    epsilon = system.op.epsilon
    limit = min(system.limit, system.op.size) if reorthogonalize else system.limit
    basis = torch.empty(limit if reorthogonalize else 0, system.op.size, dtype=x.dtype, device=x.device)

    phi = beta = system.length
    r = system.b.clone()
    v, v_before = r / beta, torch.zeros_like(x)
    w, w_before = torch.zeros_like(x), torch.zeros_like(x)
    # the last reflection (c, s), and what it left of the next column
    c, s, delta, epsilon_one = -1.0, 0.0, 0.0, 0.0
    least, step = math.inf, 0.0
    largest = 0.0  # ‖T‖, about ‖A‖ on the Krylov space
    status: Status = "iteration_limit"
    iteration = 0
    while iteration < limit:
        iteration += 1
        q = system.multiply(v)
        if iteration > 1:
            q.sub_(v_before, alpha=beta)
        alpha = dot(v, q)
        q.sub_(v, alpha=alpha)
        if reorthogonalize:
            basis[iteration - 1].copy_(v)
            orthogonalize_(q, basis[:iteration])
        following = norm(q)
        largest = max(largest, math.hypot(alpha, following, beta if iteration > 1 else 0.0))
        if following <= _BREAKDOWN * epsilon * largest:
            following = 0.0  # an invariant subspace: x is exact on it
        delta_two = c * delta + s * alpha
        gamma = s * delta - c * alpha
        epsilon_next = s * following
        delta = -c * following
        # The Rayleigh quotient of r is -c·γ; within round-off of 0 it counts as 0.
        if stop_at_nonpositive_curvature and -c * gamma <= _BREAKDOWN * epsilon * largest:
            return system.result(x, "nonpositive_curvature", iteration, direction=r)
        if relative_to == "solution":
            change = phi * math.hypot(gamma, delta)  # ‖(A + shift) r‖
            if change <= tolerance * math.sqrt(max(system.length**2 - phi**2, 0.0)):
                status = "converged"
                break
            least = min(least, change)
            if change > _DIVERGED * least:  # past the least-squares solution round-off grows in the null space
                status = "stagnated"
                x.sub_(w, alpha=step)
                break
        gamma_two = math.hypot(gamma, following)
        if gamma_two <= _BREAKDOWN * epsilon * largest:  # (A + shift) r = 0: the least-squares solution
            status = "converged" if relative_to == "solution" else "stagnated"
            break
        c, s = gamma / gamma_two, following / gamma_two
        w_next = (v - delta_two * w - epsilon_one * w_before) / gamma_two
        step = c * phi
        x.add_(w_next, alpha=step)
        phi *= s
        w_before, w = w, w_next
        epsilon_one = epsilon_next
        if progress is not None:
            progress(iteration, phi / system.length)
        if following:
            v_before, v = v, q / following
            r = s * s * r - phi * c * v
            beta = following
        if relative_to == "b" and phi <= tolerance * system.length:
            status = "converged"
            break
        if not following:
            status = "converged"
            break
    result = system.result(x, status, iteration)
    if relative_to == "b" and (status == "converged") != (result.residual <= tolerance):
        # Rounding has the last word: φ is what the residual would be in exact arithmetic.
        status = "converged" if result.residual <= tolerance else "stagnated"
        result = SolveResult(x, result.residual, status, iteration, system.products)
    return result


_BREAKDOWN = 32.0
_DIVERGED = 100.0
