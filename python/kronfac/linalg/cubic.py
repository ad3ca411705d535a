"""The cubic subproblem in a Lanczos space: steps of adaptive cubic regularisation.

Sources: Cartis, Gould & Toint, "Adaptive cubic regularisation methods for unconstrained optimization, part I" (Math.
Program. 127, 2011), section 6; Gould, Lucidi, Roma & Toint (SIAM J. Optim. 9, 1999) for the Lanczos space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.krylov_model import Chain, KrylovModel, minimise_cubic
from kronfac.linalg.probes import make_generator
from kronfac.linalg.solve import System
from kronfac.linalg.subspace import Float64Array, random_direction
from kronfac.linalg.symmetric import SymmetricOperator

CubicStatus: TypeAlias = Literal["converged", "iteration_limit", "stagnated"]
"""Why the solver stopped. "stagnated": round-off allows no smaller gradient of the model."""


@dataclass(frozen=True, eq=False)
class CubicResult:
    """The minimiser of m(s) = gᵀs + ½ sᵀHs + σ/3 ‖s‖³ over a Krylov space.

    Attributes:
        step: s (n,).
        status: why the solver stopped; only "converged" promises that the tolerance was met.
        norm: ‖s‖.
        sigma: σ.
        shift: μ = σ‖s‖. s solves (H + μI) s = -g on the space, where H + μI is positive semidefinite.
        model_decrease: -m(s), never negative.
        residual: ‖∇m(s)‖ = ‖g + Hs + σ‖s‖s‖, by the Lanczos relation.
        lowest: the smallest eigenvalue of H on the space, an upper bound of that of H; NaN for g = 0 without `explore`.
        iterations: dimension of the space.
        products: products with H that were spent.
    """

    step: Tensor
    status: CubicStatus
    norm: float
    sigma: float
    shift: float
    model_decrease: float
    residual: float
    lowest: float
    iterations: int
    products: int
    _search: _Search | None = field(default=None, repr=False)

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met."""
        return self.status == "converged"

    def regularised(self, sigma: float) -> CubicResult:
        """The result for another σ, on from the same space: a larger one rarely costs a product.

        Needs `keep=True`. The space grows where the tolerance asks for it; all results of one call of
        `cubic_regularised` share it.

        Args:
            sigma: σ > 0.

        Returns:
            The result; `products` counts the new ones alone.

        Raises:
            TypeError: sigma is not a number.
            ValueError: it is not a finite number greater than 0, or the space was not kept.
        """
        caller = "kronfac.linalg.CubicResult.regularised"
        sigma = _check_sigma(sigma, caller)
        if self._search is None:
            raise ValueError(f"{caller}: the Krylov space was not kept; call cubic_regularised with keep=True")
        return self._search.run(sigma)


def cubic_regularised(
    op: SymmetricOperator,
    gradient: Tensor,
    sigma: float,
    *,
    tolerance: float | None = None,
    max_iterations: int = 100,
    explore: bool = False,
    seed: int = 0,
    keep: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> CubicResult:
    """Minimise gᵀs + ½ sᵀHs + σ/3 ‖s‖³ globally over growing Krylov spaces, with full reorthogonalisation.

    The Krylov space of g holds nothing orthogonal to g's own eigenvectors: where the lowest eigenvector of H is (the
    hard case, or a saddle point with g = 0), its minimiser is not that of the whole space. With `explore` the space
    also grows from a random direction, by about 10 dimensions or more, until what is there is known to be convex at the
    solution (but for a probability of 0.001) or was taken in: then the result is the global minimiser.

    Args:
        op: H (n, n), symmetric, possibly indefinite.
        gradient: g (n,), of the operator's type and device.
        sigma: σ > 0, the weight of the cubic term.
        tolerance: on the norm of the model's gradient g + Hs + σ‖s‖s, relative to the greater of ‖g‖ and σ‖s‖²; None
            for min(½, √‖g‖), for g = 0 ½.
        max_iterations: largest dimension of the space, each for one product and n numbers of memory.
        explore: look for curvature that g does not see.
        seed: of the random direction.
        keep: keep the space for `CubicResult.regularised`.
        progress: called as progress(iterations, ‖∇m‖) after each iteration.

    Returns:
        The step with its status.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, an option out of range, a value that is not finite, a product that shows
            that the operator is not symmetric.
    """
    caller = "kronfac.linalg.cubic_regularised"
    system = System.check(
        op, gradient, 0.0, 1.0 if tolerance is None else tolerance, max_iterations, caller, "gradient"
    )
    sigma = _check_sigma(sigma, caller)
    for name, flag in (("explore", explore), ("keep", keep)):
        if not isinstance(flag, bool):
            raise TypeError(f"{caller}: {name}: expected True or False, got {flag!r}")
    generator = make_generator(seed, caller)
    if tolerance is None:
        tolerance = min(0.5, math.sqrt(system.length)) if system.length else 0.5
    return _Search(system, float(tolerance), generator if explore else None, keep, progress).run(sigma)


class _Search:
    """The Krylov space of one gradient, grown as far as the σ asked for need it.

    Attributes:
        system: H, g and the largest dimension.
        tolerance: on the gradient of the cubic model.
        generator: of the random direction to explore; None for no exploration.
        keep: whether results refer to this object.
        progress: of `cubic_regularised`.
        model: V and T.
    """

    def __init__(
        self,
        system: System,
        tolerance: float,
        generator: torch.Generator | None,
        keep: bool,
        progress: Callable[[int, float], None] | None,
    ) -> None:
        self.system = system
        self.tolerance = tolerance
        self.generator = generator
        self.keep = keep
        self.progress = progress
        self.model = KrylovModel(system.op)
        self._random: Chain | None = None

    def run(self, sigma: float) -> CubicResult:
        """Grow the space until it serves σ."""
        model, gradient_norm = self.model, self.system.length
        before = model.size
        if before == 0 and gradient_norm > 0:
            model.expand(model.start(self.system.b.clone()))
        elif before == 0 and self.generator is not None:
            model.expand(self._start_random(self.generator))
        elif before == 0:
            zero = torch.zeros_like(self.system.b)
            own = self if self.keep else None
            return CubicResult(zero, "converged", 0.0, sigma, 0.0, 0.0, 0.0, math.nan, 0, 0, own)
        while True:
            values, vectors = np.linalg.eigh(model.projection)
            # the first row of the basis is g / ‖g‖; without a g it does not matter
            coordinates, shift = minimise_cubic(values, gradient_norm * vectors[0], sigma)
            y = vectors @ coordinates
            length = float(np.linalg.norm(coordinates))
            residual = model.outside(y)
            if self.progress is not None and model.size > before:
                self.progress(model.size, residual)
            target = self.tolerance * max(gradient_norm, shift * length)
            floor = model.operator.epsilon * model.norm * length  # of the round-off in H s
            settled = residual <= max(target, floor)
            chain = self._explored(shift, float(values[-1] - values[0])) if settled else self._worst(y)
            if chain is None:
                status: CubicStatus = "converged" if floor <= target else "stagnated"
                break
            if model.size >= self.system.limit:
                status = "iteration_limit"
                break
            model.expand(chain)
        # -m(s) by what the secular equation says of g: positive terms alone
        decrease = 0.5 * float((values + shift) @ coordinates**2) + shift * length**2 / 6
        return CubicResult(
            step=model.vector(y),
            status=status,
            norm=length,
            sigma=sigma,
            shift=shift,
            model_decrease=decrease,
            residual=residual,
            lowest=float(values[0]),
            iterations=model.size,
            products=model.size - before,
            _search=self if self.keep else None,
        )

    def _worst(self, y: Float64Array) -> Chain | None:
        """The chain that leaves most of H s outside the space."""
        growing = [chain for chain in self.model.chains if chain.next is not None]
        return max(growing, key=lambda chain: self.model.left_out(chain, y[chain.rows]), default=None)

    def _explored(self, shift: float, spread: float) -> Chain | None:
        """The chain to look on along for curvature below -μ; None where no more is to be expected.

        After k steps from a random direction the smallest Ritz value is above the smallest eigenvalue by at most ε
        times the width of the spectrum, but for a probability of 1.648 √n exp(-√ε (2k - 1)) (Kuczyński & Woźniakowski,
        SIAM J. Matrix Anal. Appl. 13, 1992). The residual of a Ritz pair alone would not do: it belongs to some
        eigenvalue, not to the smallest.
        """
        if self.generator is None:
            return None
        if self._random is None:
            return None if self.model.size == self.system.op.size else self._start_random(self.generator)
        rows = self._random.rows
        values, vectors = np.linalg.eigh(self.model.projection[np.ix_(rows, rows)])
        # Few Ritz values do not show the width yet.
        spread += 2 * self.model.left_out(self._random, np.ones(1))
        doubt = (math.log(1.648 * math.sqrt(self.system.op.size) / _RISK) / (2 * len(rows) - 1)) ** 2
        convex = doubt <= 1 and float(values[0]) + shift > doubt * spread
        found = self.model.left_out(self._random, vectors[:, 0]) <= self.tolerance * self.model.norm
        return None if self._random.next is None or convex or (found and doubt <= _CRUDE) else self._random

    def _start_random(self, generator: torch.Generator) -> Chain:
        direction = random_direction(self.system.op, generator, self.model.basis[: self.model.size])
        self._random = self.model.start(direction)
        return self._random


# Probability that exploring ends too early, and what it has to know of the smallest eigenvalue, in widths of the
# spectrum, before it trusts in the residual: about 20 steps.
_RISK = 1e-3
_CRUDE = 0.1


def _check_sigma(sigma: Any, caller: str) -> float:
    if isinstance(sigma, bool) or not isinstance(sigma, int | float):
        raise TypeError(f"{caller}: sigma: expected a number, got {sigma!r}")
    if not math.isfinite(sigma) or sigma <= 0:
        raise ValueError(f"{caller}: sigma: expected a finite number greater than 0, got {sigma!r}")
    return float(sigma)
