"""Conjugate gradients on a curvature matrix, with an honest status."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kronfac.linalg.lanczos import norm
from kronfac.linalg.symmetric import CheckedOperator, SymmetricOperator, check_operator

Status: TypeAlias = Literal["converged", "nonpositive_curvature", "iteration_limit", "stagnated"]
"""Why a solver stopped. "stagnated": round-off allows no smaller residual."""

Preconditioner: TypeAlias = "SymmetricOperator | Callable[[Tensor], Tensor]"
"""M⁻¹, symmetric positive definite: an operator with `@`, or a function of a vector (n,)."""


@dataclass(frozen=True, eq=False)
class SolveResult:
    """Solution of a linear system.

    Attributes:
        x: the solution (n,).
        residual: measured norm ‖b - (A + shift) x‖ / ‖b‖; 0 for b = 0.
        status: why the solver stopped; only "converged" promises that the tolerance was met.
        iterations: steps that were taken.
        products: products with single vectors that were spent.
        direction: for "nonpositive_curvature" a vector p (n,) with pᵀ(A + shift)p <= 0, else None.
    """

    x: Tensor
    residual: float
    status: Status
    iterations: int
    products: int
    direction: Tensor | None = None

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met."""
        return self.status == "converged"


def cg(
    op: SymmetricOperator,
    b: Tensor,
    *,
    shift: float = 0.0,
    preconditioner: Preconditioner | None = None,
    x0: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> SolveResult:
    """Solve (A + shift·I) x = b by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    Args:
        op: A (n, n), symmetric. Where A + shift·I turns out not to be positive definite the solver stops, with the
            direction that shows it and the last x; `minres` goes on.
        b: (n,), of the operator's type and device.
        shift: added to the diagonal, a damping.
        preconditioner: M⁻¹, for example a K-FAC inverse.
        x0: where to start; zeros by default.
        tolerance: on ‖b - (A + shift)x‖ / ‖b‖, > 0. The residual is computed anew at the end.
        max_iterations: default 2n, at least 100.
        progress: called as progress(iterations, relative residual).

    Returns:
        The solution with its status.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, an option out of range, a preconditioner that is not positive definite, a
            value that is not finite.
    """
    system = System.check(op, b, shift, tolerance, max_iterations, "kronfac.linalg.cg")
    apply = check_preconditioner(preconditioner, system)
    x = torch.zeros_like(system.b) if x0 is None else system.vector(x0, "x0").clone()
    r = system.b.clone() if x0 is None else system.b - system.multiply(x)
    target = tolerance * system.length
    best = norm(r)
    if best <= target:
        return system.result(x, "converged", 0)
    p = apply(r)
    rz = system.positive(r, p)
    recomputed = 0
    for iteration in range(1, system.limit + 1):
        Ap = system.multiply(p)
        curvature = dot(p, Ap)
        # Below the round-off of the product its sign says nothing; it is as good as singular.
        if curvature <= system.op.epsilon * norm(p) * norm(Ap):
            return system.result(x, "nonpositive_curvature", iteration, direction=p)
        step = rz / curvature
        x.add_(p, alpha=step)
        r.sub_(Ap, alpha=step)
        size = norm(r)
        if progress is not None:
            progress(iteration, size / system.length)
        if size <= target:
            # The recurrence drifts from b - Ax; what is promised is the latter.
            r = system.b - system.multiply(x)
            size = norm(r)
            if size <= target:
                return system.result(x, "converged", iteration, size)
            recomputed += 1
            if recomputed > _RESTARTS or size >= _PROGRESS * best:
                return system.result(x, "stagnated", iteration, size)
            best = size
            p = apply(r)
            rz = system.positive(r, p)
            continue
        z = apply(r)
        following = system.positive(r, z)
        p = z.add(p, alpha=following / rz)
        rz = following
    return system.result(x, "iteration_limit", system.limit)


def cg_shifts(
    op: SymmetricOperator,
    b: Tensor,
    shifts: Sequence[float],
    *,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
) -> list[SolveResult]:
    """Solve (A + σI) x = b for several shifts σ by the products of one of them.

    Krylov spaces do not depend on the shift, so the residuals of all systems stay parallel to those of the least
    shift, whose system converges last (Frommer & Maass, SIAM J. Sci. Comput. 20, 1999). No preconditioner: it would
    take the spaces apart.

    Args:
        op: A (n, n), symmetric; A + σI positive definite for every shift.
        b: (n,), of the operator's type and device.
        shifts: at least one.
        tolerance: as in `cg`, for every system.
        max_iterations: as in `cg`.

    Returns:
        A result per shift, in their order; `products` counts those of all together, with one for each measured
        residual.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, an option out of range, a value that is not finite.
    """
    caller = "kronfac.linalg.cg_shifts"
    if not isinstance(shifts, Sequence) or isinstance(shifts, str) or not shifts:
        raise TypeError(f"{caller}: shifts: expected a list of at least one number, got {shifts!r}")
    systems = [System.check(op, b, shift, tolerance, max_iterations, caller) for shift in shifts]
    base = min(systems, key=lambda system: system.shift)
    gaps = [system.shift - base.shift for system in systems]
    count = len(systems)
    xs = [torch.zeros_like(base.b) for _ in systems]
    ps = [base.b.clone() for _ in systems]
    # ζ: each system's residual in units of the base's; of this step and the one before
    zeta, before = [1.0] * count, [1.0] * count
    r, p = base.b.clone(), base.b.clone()
    rr = dot(r, r)
    alpha, ratio = 1.0, 0.0
    status: Status = "iteration_limit"
    iteration, direction = 0, None
    target = tolerance * base.length
    if base.length <= 0:
        status = "converged"
    while status == "iteration_limit" and iteration < base.limit:
        iteration += 1
        Ap = base.multiply(p)
        curvature = dot(p, Ap)
        if curvature <= base.op.epsilon * norm(p) * norm(Ap):
            status, direction = "nonpositive_curvature", p
            break
        following = rr / curvature
        after = [
            z * old * alpha / (alpha * old * (1 + gap * following) + following * ratio * (old - z))
            for z, old, gap in zip(zeta, before, gaps, strict=True)
        ]
        for x, own, z, new in zip(xs, ps, zeta, after, strict=True):
            x.add_(own, alpha=following * new / z if z else 0.0)
        r.sub_(Ap, alpha=following)
        size = dot(r, r)
        ratio = size / rr
        for index, (own, z, new) in enumerate(zip(ps, zeta, after, strict=True)):
            ps[index] = own.mul_(ratio * (new / z) ** 2 if z else 0.0).add_(r, alpha=new)
        p = r + ratio * p
        alpha, rr, before, zeta = following, size, zeta, after
        if all(abs(z) * math.sqrt(rr) <= target for z in zeta):
            status = "converged"
    results = []
    spent = iteration + count
    for system, x in zip(systems, xs, strict=True):
        residual = norm(system.b - system.multiply(x))
        own_status: Status = status
        if status == "converged" and residual > target:
            own_status = "stagnated"
        elif residual <= target:
            own_status = "converged"
        results.append(
            SolveResult(
                x,
                residual / system.length if system.length else 0.0,
                own_status,
                iteration,
                spent,
                direction if own_status == "nonpositive_curvature" else None,
            )
        )
    return results


_RESTARTS = 5
_PROGRESS = 0.5  # what a restart has to gain on the one before


@dataclass
class System:
    """A checked linear system, which counts its products.

    Attributes:
        op: A.
        b: right side (n,).
        shift: on the diagonal.
        length: ‖b‖.
        limit: most iterations.
        caller: the public function that error messages name.
        products: spent so far.
    """

    op: CheckedOperator
    b: Tensor
    shift: float
    length: float
    limit: int
    caller: str
    products: int = 0

    @classmethod
    def check(
        cls,
        op: SymmetricOperator,
        b: Any,
        shift: Any,
        tolerance: Any,
        max_iterations: Any,
        caller: str,
        name_of_b: str = "b",
    ) -> System:
        """Check the arguments that all solvers share; messages call the right side `name_of_b`."""
        operator = check_operator(op, caller)
        for name, value in (("shift", shift), ("tolerance", tolerance)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{caller}: {name}: expected a number, got {value!r}")
            if not math.isfinite(value) or (name == "tolerance" and value <= 0):
                wanted = "a finite number" + (" greater than 0" if name == "tolerance" else "")
                raise ValueError(f"{caller}: {name}: expected {wanted}, got {value!r}")
        if max_iterations is not None and (isinstance(max_iterations, bool) or not isinstance(max_iterations, int)):
            raise TypeError(f"{caller}: max_iterations: expected an integer or None, got {max_iterations!r}")
        if max_iterations is not None and max_iterations < 1:
            raise ValueError(f"{caller}: max_iterations: expected at least 1, got {max_iterations}")
        limit = max(2 * operator.size, 100) if max_iterations is None else max_iterations
        system = cls(operator, torch.empty(0), float(shift), 0.0, limit, caller)
        system.b = system.vector(b, name_of_b)
        system.length = norm(system.b)
        return system

    def vector(self, value: Any, name: str) -> Tensor:
        """Check a vector of the system's size.

        Raises:
            TypeError: no tensor of the operator's type.
            ValueError: another shape or device, or not finite.
        """
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.caller}: {name}: expected a tensor, got {type(value).__name__}")
        if value.dtype != self.op.dtype:
            raise TypeError(f"{self.caller}: {name}: expected {self.op.dtype}, got {value.dtype}")
        if tuple(value.shape) != (self.op.size,) or value.device != self.op.device:
            raise ValueError(
                f"{self.caller}: {name}: expected shape ({self.op.size},) on {self.op.device}, got "
                f"{tuple(value.shape)} on {value.device}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"{self.caller}: {name}: expected finite values, got NaN or infinity")
        return value.detach()

    def multiply(self, vector: Tensor) -> Tensor:
        """(A + shift) v."""
        self.products += 1
        product = self.op.matvec(vector)
        return product.add(vector, alpha=self.shift) if self.shift else product

    def positive(self, r: Tensor, z: Tensor) -> float:
        """rᵀM⁻¹r, which a positive definite preconditioner makes positive."""
        value = dot(r, z)
        if not value > 0:
            raise ValueError(
                f"{self.caller}: preconditioner: expected a positive definite one, got rᵀM⁻¹r = {value:.3g} for a "
                "residual r"
            )
        return value

    def result(
        self,
        x: Tensor,
        status: Status,
        iterations: int,
        residual: float | None = None,
        direction: Tensor | None = None,
    ) -> SolveResult:
        """The result, its residual measured where that was not done just now."""
        if residual is None:
            residual = norm(self.b - self.multiply(x)) if self.length else 0.0
        relative = residual / self.length if self.length else 0.0
        return SolveResult(x, relative, status, iterations, self.products, direction)


def check_preconditioner(preconditioner: Any, system: System) -> Callable[[Tensor], Tensor]:
    """The preconditioner as a function whose results are checked.

    Raises:
        TypeError: neither an operator nor callable.
    """
    if preconditioner is None:
        return lambda vector: vector.clone()
    where = f"{system.caller}: preconditioner"
    if not (hasattr(preconditioner, "__matmul__") or callable(preconditioner)):
        raise TypeError(f"{where}: expected an operator with `@` or a callable, got {type(preconditioner).__name__}")

    def apply(vector: Tensor) -> Tensor:
        by_product = hasattr(preconditioner, "__matmul__")
        result = preconditioner @ vector if by_product else preconditioner(vector)
        if not isinstance(result, Tensor) or result.shape != vector.shape or not bool(result.isfinite().all()):
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{where}: expected a finite tensor of shape {tuple(vector.shape)}, got {got}")
        result = result.detach().to(vector)
        return result.clone() if result.data_ptr() == vector.data_ptr() else result

    return apply


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product; float32 sums of millions of terms are off by 1e-4, so blocks are summed in float64."""
    if a.dtype == torch.float64:
        return float(torch.dot(a, b))
    return float((a * b).sum(dtype=torch.float64))
