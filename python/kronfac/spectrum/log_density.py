"""A spectral density on a logarithmic axis: of log₁₀|λ|, for positive and negative eigenvalues apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kronfac._plotting import axes_or_new
from kronfac.linalg.lanczos import Float64Array
from kronfac.spectrum.results import DensityResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Standard deviation of the broadening in decades: a factor of 1.12.
_SIGMA = 0.05
# What is smaller than so many round-offs of the largest is not told from zero by products of this precision.
_ROUNDOFFS = 100.0
_REACH = 6.0
_POINTS_PER_SIGMA = 4.0
_LEAST_POINTS = 512
_MOST_POINTS = 2**20


@dataclass(frozen=True, eq=False)
class LogDensityResult:
    """A spectral density over the decades of |λ|, estimated by stochastic Lanczos quadrature.

    Lanczos resolves the ends of a spectrum and what lies apart, and smears a bulk around zero over the decades below
    its own width: more steps push the limit down. `uncertain_mass` says how much is concerned.

    Attributes:
        grid: points (g,) on the axis log₁₀|λ|, ascending, float64.
        positive: the density (g,) of positive eigenvalues per decade; its integral is `positive_mass`.
        negative: that of negative eigenvalues; its integral is `negative_mass`.
        sigma: standard deviation of the broadening, in decades.
        threshold: eigenvalues of smaller magnitude count as zero.
        positive_mass: share of the eigenvalues above the threshold.
        negative_mass: share of those below minus the threshold.
        zero_mass: share of those between.
        uncertain_mass: share in nodes of which the residual exceeds |θ|: the eigenvalue that is near such a node may
            lie in any lower decade, or have the other sign.
        linear: the same estimate on a linear axis, with nodes, weights, and the trace and Frobenius norm they imply.
    """

    grid: Tensor
    positive: Tensor
    negative: Tensor
    sigma: float
    threshold: float
    positive_mass: float
    negative_mass: float
    zero_mass: float
    uncertain_mass: float
    linear: DensityResult

    @property
    def products(self) -> int:
        """Products with single vectors that were spent."""
        return self.linear.products

    @property
    def interrupted(self) -> bool:
        """Whether a KeyboardInterrupt ended the work."""
        return self.linear.interrupted

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw both densities over |λ|, on logarithmic axes; the legend has the share of each and of what is uncertain.

        Args:
            ax: axes to draw on; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "LogDensityResult.plot")
        places = 10.0 ** self.grid.numpy()
        least, highest = self._range()
        for values, mass, sign, colour in (
            (self.positive, self.positive_mass, ">", "C0"),
            (self.negative, self.negative_mass, "<", "C1"),
        ):
            if mass > 0.0:
                shown = np.maximum(values.numpy(), least)
                axes.fill_between(places, least, shown, color=colour, alpha=0.2, linewidth=0.0)
                axes.plot(places, shown, color=colour, linewidth=1.2, label=f"λ {sign} 0: {_percent(mass)}")
        if self.zero_mass > 0.0:
            axes.plot([], [], " ", label=f"|λ| < {self.threshold:.1g}: {_percent(self.zero_mass)}")
        if self.uncertain_mass > 0.005:
            axes.plot([], [], " ", label=f"decade or sign uncertain: {_percent(self.uncertain_mass)}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(least, 3.0 * highest)
        axes.set_xlim(places[0], places[-1])
        axes.set_xlabel("|eigenvalue|")
        axes.set_ylabel(f"density per decade (σ = {self.sigma:.2g} decades)")
        axes.legend()
        return axes  # type: ignore[no-any-return]

    def _range(self) -> tuple[float, float]:
        """The foot below which there is nothing to see, and the highest value."""
        weights = self.linear.weights.numpy()
        highest = max(float(self.positive.max()), float(self.negative.max())) or 1.0
        least = float(weights[weights > 1e-12 * weights.max()].min())
        return max(1e-2 * least / (self.sigma * math.sqrt(2.0 * math.pi)), 1e-6 * highest), highest


def on_log_axis(
    linear: DensityResult,
    sigma: float | None,
    threshold: float | None,
    points: Float64Array | None,
    epsilon: float,
    caller: str,
) -> LogDensityResult:
    """Broaden nodes on the axis log₁₀|θ|.

    Args:
        linear: with nodes, weights and residuals.
        sigma: in decades, or None.
        threshold: below which a node counts as zero, or None.
        points: of log₁₀|λ|, or None.
        epsilon: unit round-off of the products.
        caller: the public function that error messages name.
    """
    nodes, weights = linear.nodes.numpy(), linear.weights.numpy()
    assert linear.residuals is not None
    residuals = linear.residuals.numpy()
    sizes = np.abs(nodes)
    if threshold is None:
        threshold = max(_ROUNDOFFS * epsilon * float(sizes.max()), float(np.finfo(np.float64).tiny))
    sigma = _SIGMA if sigma is None else sigma
    counted = sizes >= threshold
    if points is None:
        decades = np.log10(sizes[counted]) if counted.any() else np.array([math.log10(threshold)])
        low, high = float(decades.min()) - _REACH * sigma, float(decades.max()) + _REACH * sigma
        needed = math.ceil((high - low) / sigma * _POINTS_PER_SIGMA) + 1
        if needed > _MOST_POINTS:
            raise ValueError(
                f"{caller}: sigma: {sigma:.3g} decades is too fine for {high - low:.3g} of them (the grid would need "
                f"{needed} points); use a larger sigma or give a grid of your own"
            )
        points = np.linspace(low, high, max(_LEAST_POINTS, needed))
    sides = {}
    for name, side in (("positive", counted & (nodes > 0)), ("negative", counted & (nodes < 0))):
        order = np.argsort(sizes[side], kind="stable")
        sides[name] = broaden(points, np.log10(sizes[side][order]), weights[side][order], sigma)
    return LogDensityResult(
        grid=torch.from_numpy(points),
        positive=torch.from_numpy(sides["positive"]),
        negative=torch.from_numpy(sides["negative"]),
        sigma=sigma,
        threshold=threshold,
        positive_mass=float(weights[counted & (nodes > 0)].sum()),
        negative_mass=float(weights[counted & (nodes < 0)].sum()),
        zero_mass=float(weights[~counted].sum()),
        uncertain_mass=float(weights[counted & (residuals > sizes)].sum()),
        linear=linear,
    )


def broaden(points: Float64Array, nodes: Float64Array, weights: Float64Array, sigma: float) -> Float64Array:
    """Σ w N(t; θ, σ²) at the given ascending points."""
    values = np.zeros(len(points))
    scale = 1.0 / (sigma * math.sqrt(2.0 * math.pi))
    # One node at a time over the points it reaches: nodes times points would not fit for a fine grid.
    for node, weight in zip(nodes, weights, strict=True):
        first, last = np.searchsorted(points, (node - 9.0 * sigma, node + 9.0 * sigma))
        offsets = (points[first:last] - node) / sigma
        values[first:last] += weight * scale * np.exp(-0.5 * offsets**2)
    return values


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
