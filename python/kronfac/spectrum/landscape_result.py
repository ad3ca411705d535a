"""What `landscape` returns, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kronfac._plotting import axes_or_new
from kronfac.linalg.lanczos import Float64Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = 24


@dataclass(frozen=True, eq=False)
class LandscapeResult:
    """The loss on a line or plane through the parameters θ.

    Attributes:
        coordinates: one tensor (g,) per direction, float64: a and b of θ + a d₁ + b d₂.
        losses: by data set (the name "loss" where only one was given), float64, (g₁,) or (g₁, g₂). Infinity and NaN are
            what the loss was there; NaN also where it was not evaluated.
        evaluated: bool, of the same shape: False for points that an interrupt left out.
        centre: the loss at θ, by data set.
        lengths: the norm of each direction.
        labels: what the directions are called in plots.
        slopes: gᵀd at θ by data set, float64 (directions,); None unless asked for.
        curvatures: dᵀHd at θ by data set, float64 (directions, directions); None unless asked for.
        evaluations: passes over a data set that were made, fewer where a checkpoint was taken up.
        products: Hessian-vector products that were spent, for the curvatures.
        interrupted: whether points are missing.
    """

    coordinates: tuple[Tensor, ...]
    losses: Mapping[str, Tensor]
    evaluated: Tensor
    centre: Mapping[str, float]
    lengths: tuple[float, ...]
    labels: tuple[str, ...]
    slopes: Mapping[str, Tensor] | None
    curvatures: Mapping[str, Tensor] | None
    evaluations: int
    products: int
    interrupted: bool

    def plot(self, ax: Axes | None = None, *, log: bool = False, dataset: str | None = None) -> Axes:
        """Draw lines over one direction, or contours over two; gaps where the loss is not finite.

        Dashed lines are the quadratic model of slope and curvature, where these were computed.

        Args:
            ax: axes to draw on; a new figure by default.
            log: a logarithmic axis of the loss, or logarithmically spaced contours.
            dataset: which one to draw. Default: all of them as lines, the first one as contours.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an unknown data set, `log` for a loss that is not positive everywhere, or no finite loss.
        """
        if dataset is not None and dataset not in self.losses:
            raise ValueError(
                f"LandscapeResult.plot: dataset: expected one of {', '.join(map(repr, self.losses))}, got {dataset!r}"
            )
        names = [dataset] if dataset is not None else list(self.losses)[: None if len(self.coordinates) == 1 else 1]
        surfaces = {name: _finite(self.losses[name].numpy(), log) for name in names}
        axes: Any = axes_or_new(ax, "LandscapeResult.plot")
        if len(self.coordinates) == 1:
            self._draw_lines(axes, surfaces, log)
        else:
            self._draw_contours(axes, names[0], surfaces[names[0]], log)
        axes.set_xlabel(self.labels[0])
        return axes  # type: ignore[no-any-return]

    def _draw_lines(self, axes: Any, surfaces: Mapping[str, Float64Array], log: bool) -> None:
        steps = self.coordinates[0].numpy()
        for number, (name, values) in enumerate(surfaces.items()):
            colour = f"C{number}"
            axes.plot(steps, values, color=colour, linewidth=1.4, label=name)
            if self.slopes is not None and self.curvatures is not None:
                slope, bend = float(self.slopes[name][0]), float(self.curvatures[name][0, 0])
                model = self.centre[name] + slope * steps + 0.5 * bend * steps**2
                shown = (model <= np.nanmax(values)) & (model >= np.nanmin(values))
                axes.plot(
                    steps, np.where(shown, model, np.nan), color=colour, linewidth=1.0, linestyle="--", zorder=1.5
                )
        axes.axvline(0.0, color="0.7", linewidth=0.8, zorder=1)
        if log:
            axes.set_yscale("log")
        axes.set_ylabel("loss")
        if len(surfaces) > 1:
            axes.legend()

    def _draw_contours(self, axes: Any, name: str, values: Float64Array, log: bool) -> None:
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if high <= low:  # a constant: contours need some range
            low, high = low - 0.5 * abs(low) - 1e-12, high + 0.5 * abs(high) + 1e-12
        levels = np.geomspace(low, high, _LEVELS) if log and low > 0 else np.linspace(low, high, _LEVELS)
        norm: Any = None
        if log:
            from matplotlib.colors import LogNorm

            norm = LogNorm(low, high)
        # The first direction runs to the right; contours have it along the columns.
        surface = np.ma.masked_invalid(values.T)
        steps = [axis.numpy() for axis in self.coordinates]
        filled = axes.contourf(*steps, surface, levels=levels, norm=norm, cmap="viridis", extend="neither")
        axes.contour(*steps, surface, levels=levels[::3], colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0.0, 0.0, marker="+", color="white", markersize=9, markeredgewidth=1.4)
        bar = axes.figure.colorbar(filled, ax=axes, format="%.3g")
        bar.set_label("loss" if name == "loss" else f"{name} loss")
        axes.set_ylabel(self.labels[1])


def _finite(values: Float64Array, log: bool) -> Float64Array:
    """The losses with NaN for all that is not finite."""
    finite = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(finite).all():
        raise ValueError("LandscapeResult.plot: no point has a finite loss")
    if log and float(np.nanmin(finite)) <= 0.0:
        raise ValueError(
            f"LandscapeResult.plot: log: the loss is {float(np.nanmin(finite)):.3g} somewhere, and zero or less has no "
            "logarithm; use log=False"
        )
    return finite
