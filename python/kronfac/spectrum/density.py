"""Spectral density of a symmetric operator by stochastic Lanczos quadrature (SLQ)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronfac.linalg.lanczos import Float64Array, Quadrature, lanczos_quadratures
from kronfac.linalg.probes import draw_probes, make_generator, standard_error
from kronfac.linalg.symmetric import CheckedOperator, SymmetricOperator, check_operator
from kronfac.linalg.trace import StoppedError
from kronfac.spectrum._guard import guarded
from kronfac.spectrum._interrupt import Interrupt, interruptible
from kronfac.spectrum._options import BASIS_BYTES, Progress, check_choice, check_count, check_positive
from kronfac.spectrum._progress import shown
from kronfac.spectrum.log_density import LogDensityResult, broaden, on_log_axis
from kronfac.spectrum.results import DensityChecks, DensityResult

_COLUMNS = 8  # probes per call of op @ V: one pass over the data serves all of them
# The Gaussians reach this many σ beyond the outermost nodes: what lies further out is below 1e-8 of the mass.
_REACH = 6.0
# Grid points per σ: the trapezoidal rule is then exact to round-off.
_POINTS_PER_SIGMA = 4.0
_LEAST_POINTS = 1024
_MOST_POINTS = 2**20


@overload
def density(
    op: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 80,
    axis: Literal["linear"] = "linear",
    sigma: float | None = None,
    grid: Tensor | npt.NDArray[np.floating] | None = None,
    threshold: None = None,
    checks: int = 0,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> DensityResult: ...


@overload
def density(
    op: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 80,
    axis: Literal["log"],
    sigma: float | None = None,
    grid: Tensor | npt.NDArray[np.floating] | None = None,
    threshold: float | None = None,
    checks: int = 0,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> LogDensityResult: ...


def density(
    op: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 80,
    axis: str = "linear",
    sigma: float | None = None,
    grid: Tensor | npt.NDArray[np.floating] | None = None,
    threshold: float | None = None,
    checks: int = 0,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> DensityResult | LogDensityResult:
    """Estimate the eigenvalue density φ(t) = (1/n) Σ_i δ(t - λ_i), broadened by a Gaussian.

    Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani, Krishnan & Xiao, arXiv:1901.10159): for each
    random probe v the m-step Lanczos tridiagonal T = YΘYᵀ gives nodes θ and weights τ² = (e₁ᵀy)² of the spectral
    measure of v; their mean over the probes, each node replaced by N(t; θ, σ²), is the density.

    Args:
        op: a symmetric operator with `shape` and `@` (`kronfac.operators`, a torch matrix); n is its size.
        probes: number of random probes, at least 2. The error falls with 1/√(n probes).
        steps: m, Lanczos steps per probe (fewer when n is smaller): the resolution along the spectrum.
        axis: "linear"; or "log" for the density of log₁₀|λ|, of positive and negative eigenvalues apart, where a
            spectrum extends over many decades.
        sigma: standard deviation of the broadening, in units of eigenvalues (default: 0.5 % of the width of the
            spectrum), or in decades on the logarithmic axis (default: 0.05). It blurs structure finer than itself.
        grid: ascending points at which to give the density, eigenvalues or log₁₀|λ| (default: at least 1024, reaching
            6 σ beyond the nodes, four per σ or more). On a grid of one's own the integral is 1 only if the grid covers
            the spectrum finely.
        threshold: on the logarithmic axis: what is smaller in magnitude counts as zero (default: 100 round-offs of the
            largest |θ|, below which products of this precision tell nothing).
        checks: number of further probes for estimates of trace and Frobenius norm that are independent of the density:
            `checks` of the result compares them with what it implies. One product each; 0, or at least 2.
        seed: of the probes; equal seeds give equal results.
        progress: called as progress(products, probes * steps + checks); True for a progress bar.

    Returns:
        The density, its nodes and weights, and the trace and squared Frobenius norm that they imply, with standard
        errors over the probes. On the logarithmic axis a `LogDensityResult`, whose `linear` is the other. An interrupt
        (Ctrl-C) ends the work with the steps and probes done so far, marked as interrupted.

    Raises:
        KeyboardInterrupt: before the first step was done.
        TypeError: `op` is no operator, or an option has the wrong type.
        ValueError: `op` is not square or not symmetric, an option is out of range, or a product is not finite.
    """
    caller = "kronfac.spectrum.density"
    operator = check_operator(op, caller)
    try:
        with shown(progress, caller) as report:
            return estimate(
                operator,
                probes=probes,
                steps=steps,
                axis=axis,
                sigma=sigma,
                grid=grid,
                threshold=threshold,
                checks=checks,
                seed=seed,
                progress=report,
            )
    except StoppedError as error:
        raise KeyboardInterrupt from error


def estimate(
    operator: CheckedOperator,
    *,
    probes: int,
    steps: int,
    axis: str,
    sigma: float | None,
    grid: Tensor | npt.NDArray[np.floating] | None,
    threshold: float | None,
    checks: int,
    seed: int,
    progress: Progress | None,
) -> DensityResult | LogDensityResult:
    """`density` of a checked operator, whose `caller` error messages name.

    Raises:
        StoppedError: the user asked to stop before the first step was done.
    """
    caller = operator.caller
    probes = check_count(probes, "probes", caller, least=2)
    steps = min(check_count(steps, "steps", caller, least=1), operator.size)
    checks = check_count(checks, "checks", caller, least=0)
    if checks == 1:
        raise ValueError(f"{caller}: checks: expected 0 or at least 2 probes, got 1: one has no standard error")
    axis = check_choice(axis, "axis", caller, ("linear", "log"))
    if threshold is not None:
        threshold = check_positive(threshold, "threshold", caller)
        if axis == "linear":
            raise ValueError(f'{caller}: threshold: is for axis="log"; on a linear axis zero needs no definition')
    if sigma is not None:
        sigma = check_positive(sigma, "sigma", caller)
    points = None if grid is None else _check_grid(grid, caller)
    generator = make_generator(seed, caller)
    bytes_each = operator.size * steps * torch.finfo(operator.dtype).bits // 8
    group = max(1, min(probes, BASIS_BYTES // bytes_each))
    quadratures: list[Quadrature] = []
    products = 0
    total = probes * steps + checks
    found: _Moments | None = None
    with interruptible() as stop:
        operator = guarded(operator, stop)
        while len(quadratures) < probes and not stop.requested:
            count = min(group, probes - len(quadratures))
            # Rademacher probes have the same length √n all, so that n Σ τ²θ is Hutchinson's estimate exactly.
            starts = draw_probes(
                operator.size, count, "rademacher", generator, dtype=operator.dtype, device=operator.device
            )
            done = products

            def report(spent: int, done: int = done) -> None:
                if progress is not None:
                    progress(done + spent, total)

            some, spent = lanczos_quadratures(operator, starts, steps, report, lambda: stop.requested)
            quadratures += some
            products += spent
        if not quadratures:
            raise StoppedError
        interrupted = stop.requested
        if checks and not interrupted:
            found = _independent_moments(operator, checks, generator, stop, products, total, progress)
            products += 0 if found is None else found.products
            interrupted = stop.requested and (found is None or found.products < checks)
    traces = [operator.size * float(q.weights @ q.nodes) for q in quadratures]
    squares = [operator.size * float(q.weights @ q.nodes**2) for q in quadratures]
    nodes = np.concatenate([q.nodes for q in quadratures])
    weights = np.concatenate([q.weights for q in quadratures]) / len(quadratures)
    residuals = np.concatenate([q.residuals for q in quadratures])
    order = np.argsort(nodes, kind="stable")
    nodes, weights, residuals = nodes[order], weights[order], residuals[order]
    width = sigma if sigma is not None and axis == "linear" else _default_sigma(nodes)
    linear_points = points if points is not None and axis == "linear" else _default_grid(nodes, width, caller)
    linear = DensityResult(
        grid=torch.from_numpy(linear_points),
        values=torch.from_numpy(broaden(linear_points, nodes, weights, width)),
        nodes=torch.from_numpy(nodes),
        weights=torch.from_numpy(weights),
        sigma=width,
        trace=float(np.mean(traces)),
        trace_stderr=_error(traces),
        squared_frobenius=float(np.mean(squares)),
        squared_frobenius_stderr=_error(squares),
        products=products,
        residuals=torch.from_numpy(residuals),
        checks=None if found is None else _compare(found, traces, squares),
        interrupted=interrupted,
    )
    if axis == "linear":
        return linear
    return on_log_axis(linear, sigma, threshold, points, operator.epsilon, caller)


@dataclass(frozen=True)
class _Moments:
    traces: list[float]
    squares: list[float]

    @property
    def products(self) -> int:
        return len(self.traces)


def _independent_moments(
    operator: CheckedOperator,
    probes: int,
    generator: torch.Generator,
    stop: Interrupt,
    products: int,
    total: int,
    progress: Progress | None,
) -> _Moments | None:
    """zᵀAz and ‖Az‖² of fresh probes; None where an interrupt left fewer than two."""
    found = _Moments([], [])
    while found.products < probes and not stop.requested:
        count = min(_COLUMNS, probes - found.products)
        drawn = draw_probes(operator.size, count, "rademacher", generator, dtype=operator.dtype, device=operator.device)
        try:
            images = operator.matmat(drawn)
        except StoppedError:
            break
        found.traces.extend((drawn * images).sum(0, dtype=torch.float64).tolist())
        found.squares.extend(images.square().sum(0, dtype=torch.float64).tolist())
        if progress is not None:
            progress(products + found.products, total)
    return found if found.products >= 2 else None


def _compare(found: _Moments, traces: list[float], squares: list[float]) -> DensityChecks:
    def score(implied: list[float], own: list[float]) -> float:
        difference = float(np.mean(implied)) - float(np.mean(own))
        spread = math.hypot(_error(implied), _error(own))
        # Where every probe gives the same (a multiple of the identity), what is left is round-off.
        spread = max(spread, 1e-5 * abs(float(np.mean(own))))
        return difference / spread if spread > 0.0 else 0.0

    return DensityChecks(
        trace=float(np.mean(found.traces)),
        trace_stderr=_error(found.traces),
        squared_frobenius=float(np.mean(found.squares)),
        squared_frobenius_stderr=_error(found.squares),
        trace_score=score(traces, found.traces),
        squared_frobenius_score=score(squares, found.squares),
        products=found.products,
    )


def _error(samples: list[float]) -> float:
    return standard_error(samples) if len(samples) > 1 else math.inf


def _default_sigma(nodes: Float64Array) -> float:
    width = float(nodes[-1] - nodes[0])
    # Multiples of the identity have no width; any width is then arbitrary, and this one is at least proportionate.
    size = float(np.abs(nodes).max())
    return 0.005 * (width if width > 1e-6 * size else size if size > 0.0 else 1.0)


def _default_grid(nodes: Float64Array, sigma: float, caller: str) -> Float64Array:
    low, high = float(nodes[0]) - _REACH * sigma, float(nodes[-1]) + _REACH * sigma
    needed = math.ceil((high - low) / sigma * _POINTS_PER_SIGMA) + 1
    if needed > _MOST_POINTS:
        raise ValueError(
            f"{caller}: sigma: {sigma:.3g} is too fine for a spectrum of width {high - low:.3g} (the grid would need "
            f"{needed} points); use a larger sigma or give a grid of your own"
        )
    return np.linspace(low, high, max(_LEAST_POINTS, needed))


def _check_grid(grid: Tensor | npt.NDArray[np.floating], caller: str) -> Float64Array:
    if not isinstance(grid, Tensor | np.ndarray):
        raise TypeError(f"{caller}: grid: expected a tensor or an array of points, got {type(grid).__name__}")
    array = grid.detach().cpu().numpy() if isinstance(grid, Tensor) else grid
    points = np.array(array, dtype=np.float64)
    if points.ndim != 1 or len(points) < 2 or not np.isfinite(points).all() or not (np.diff(points) > 0).all():
        raise ValueError(
            f"{caller}: grid: expected at least two finite, strictly ascending points (g,), got shape {points.shape}"
        )
    return points
