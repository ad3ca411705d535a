"""Spectral density of a symmetric operator by stochastic Lanczos quadrature (SLQ)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronfac.linalg.lanczos import Float64Array, Quadrature, lanczos_quadratures
from kronfac.linalg.probes import draw_probes, make_generator, standard_error
from kronfac.linalg.symmetric import SymmetricOperator, check_operator
from kronfac.spectrum._options import BASIS_BYTES, Progress, check_count, check_positive
from kronfac.spectrum.results import DensityResult

# The Gaussians reach this many σ beyond the outermost nodes: what lies further out is below 1e-8 of the mass.
_REACH = 6.0
# Grid points per σ: the trapezoidal rule is then exact to round-off.
_POINTS_PER_SIGMA = 4.0
_LEAST_POINTS = 1024
_MOST_POINTS = 2**20


def density(
    op: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 80,
    sigma: float | None = None,
    grid: Tensor | npt.NDArray[np.floating] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DensityResult:
    """Estimate the eigenvalue density φ(t) = (1/n) Σ_i δ(t - λ_i), broadened by a Gaussian.

    Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani, Krishnan & Xiao, arXiv:1901.10159): for each
    random probe v the m-step Lanczos tridiagonal T = YΘYᵀ gives nodes θ and weights τ² = (e₁ᵀy)² of the spectral
    measure of v; their mean over the probes, each node replaced by N(t; θ, σ²), is the density.

    Args:
        op: a symmetric operator with `shape` and `@` (`kronfac.operators`, a torch matrix); n is its size.
        probes: number of random probes, at least 2. The error falls with 1/√(n probes).
        steps: m, Lanczos steps per probe (fewer when n is smaller): the resolution along the spectrum.
        sigma: standard deviation of the broadening, in units of eigenvalues (default: 0.5 % of the width of the
            spectrum). It blurs structure finer than itself.
        grid: ascending points at which to give the density (default: at least 1024, reaching 6 σ beyond the nodes, four
            per σ or more). On a grid of one's own the integral is 1 only if the grid covers the spectrum finely.
        seed: of the probes; equal seeds give equal results.
        progress: called as progress(products, probes * steps).

    Returns:
        The density, its nodes and weights, and the trace and squared Frobenius norm that they imply, with standard
        errors over the probes.

    Raises:
        TypeError: `op` is no operator, or an option has the wrong type.
        ValueError: `op` is not square or not symmetric, an option is out of range, or a product is not finite.
    """
    caller = "kronfac.spectrum.density"
    operator = check_operator(op, caller)
    probes = check_count(probes, "probes", caller, least=2)
    steps = min(check_count(steps, "steps", caller, least=1), operator.size)
    if sigma is not None:
        sigma = check_positive(sigma, "sigma", caller)
    points = None if grid is None else _check_grid(grid, caller)
    generator = make_generator(seed, caller)
    bytes_each = operator.size * steps * torch.finfo(operator.dtype).bits // 8
    group = max(1, min(probes, BASIS_BYTES // bytes_each))
    quadratures: list[Quadrature] = []
    products = 0
    while len(quadratures) < probes:
        count = min(group, probes - len(quadratures))
        # Rademacher probes have the same length √n all, so that n Σ τ²θ is Hutchinson's estimate exactly.
        starts = draw_probes(
            operator.size, count, "rademacher", generator, dtype=operator.dtype, device=operator.device
        )
        done = products

        def report(spent: int, done: int = done) -> None:
            if progress is not None:
                progress(done + spent, probes * steps)

        found, spent = lanczos_quadratures(operator, starts, steps, report)
        quadratures += found
        products += spent
    traces = [operator.size * float(q.weights @ q.nodes) for q in quadratures]
    squares = [operator.size * float(q.weights @ q.nodes**2) for q in quadratures]
    nodes = np.concatenate([q.nodes for q in quadratures])
    weights = np.concatenate([q.weights for q in quadratures]) / probes
    order = np.argsort(nodes, kind="stable")
    nodes, weights = nodes[order], weights[order]
    if sigma is None:
        sigma = _default_sigma(nodes)
    if points is None:
        points = _default_grid(nodes, sigma, caller)
    return DensityResult(
        grid=torch.from_numpy(points),
        values=torch.from_numpy(_broaden(points, nodes, weights, sigma)),
        nodes=torch.from_numpy(nodes),
        weights=torch.from_numpy(weights),
        sigma=sigma,
        trace=float(np.mean(traces)),
        trace_stderr=standard_error(traces),
        squared_frobenius=float(np.mean(squares)),
        squared_frobenius_stderr=standard_error(squares),
        products=products,
    )


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


def _broaden(points: Float64Array, nodes: Float64Array, weights: Float64Array, sigma: float) -> Float64Array:
    values = np.zeros(len(points))
    scale = 1.0 / (sigma * math.sqrt(2.0 * math.pi))
    # One node at a time over the points it reaches: nodes times points would not fit for a fine grid.
    for node, weight in zip(nodes, weights, strict=True):
        first, last = np.searchsorted(points, (node - 9.0 * sigma, node + 9.0 * sigma))
        offsets = (points[first:last] - node) / sigma
        values[first:last] += weight * scale * np.exp(-0.5 * offsets**2)
    return values


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
