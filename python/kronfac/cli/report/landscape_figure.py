"""The loss along one eigenvector, or over the plane of two, from the contents of spectrum.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kronfac.cli.report.theme import MaxNLocator, Theme, axes_of, png_of

Array = npt.NDArray[np.float64]

_LEVELS = 22
_WIDE = 30.0  # a ratio of highest to lowest loss from which contours are spaced logarithmically


def draw_landscape(report: Mapping[str, Any], theme: Theme) -> bytes:
    """Lines over one direction, contours over two.

    Args:
        report: the contents of spectrum.json.
        theme: colours.

    Returns:
        A PNG file.
    """
    found = report["landscape"]
    losses = {name: _array(values) for name, values in found["losses"].items()}
    if len(found["coordinates"]) == 1:
        return _line(found, losses, theme)
    return _plane(found, losses, theme)


def _line(found: Mapping[str, Any], losses: Mapping[str, Array], theme: Theme) -> bytes:
    steps = _array(found["coordinates"][0])
    with axes_of(theme, size=(10.4, 4.2)) as (figure, axes):
        for (name, values), colour in zip(losses.items(), (theme.blue, theme.orange), strict=False):
            slope, bend = found["slopes"][name][0], found["curvatures"][name][0][0]
            model = found["centre"][name] + slope * steps + 0.5 * bend * steps**2
            # The model is drawn as far as the loss itself reaches, or it would set the scale.
            shown = (model <= np.nanmax(values)) & (model >= np.nanmin(values))
            axes.plot(steps, np.where(shown, model, np.nan), color=colour, linewidth=1.3, linestyle=(0, (4, 3)))
            axes.plot(steps, values, color=colour, linewidth=2.2, label=f"{name} loss")
            axes.plot(0.0, found["centre"][name], "o", color=colour, markersize=6)
        axes.plot([], [], color=theme.ink, linewidth=1.3, linestyle=(0, (4, 3)), label="slope and curvature at 0")
        axes.axvline(0.0, color=theme.faint, linewidth=1.0, zorder=1)
        axes.set_xlim(float(steps[0]), float(steps[-1]))
        axes.set_xlabel(f"distance {found['labels'][0]}")
        axes.set_ylabel("loss")
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return png_of(figure)


def _plane(found: Mapping[str, Any], losses: Mapping[str, Array], theme: Theme) -> bytes:
    from matplotlib.colors import LogNorm, Normalize

    first, second = (_array(axis) for axis in found["coordinates"])
    low = min(float(np.nanmin(values)) for values in losses.values())
    high = max(float(np.nanmax(values)) for values in losses.values())
    if high <= low:  # a constant: contours need some range
        low, high = low - 0.5 * abs(low) - 1e-12, high + 0.5 * abs(high) + 1e-12
    logarithmic = low > 0 and high / low > _WIDE
    levels = np.geomspace(low, high, _LEVELS) if logarithmic else np.linspace(low, high, _LEVELS)
    levels[-1] = high * (1 + 1e-9) if high > 0 else high  # round-off must not leave the highest point out
    scale: Any = LogNorm(low, high) if logarithmic else Normalize(low, high)
    size = (10.4, 4.9) if len(losses) > 1 else (7.4, 5.6)
    with axes_of(theme, panels=len(losses), size=size, sharey=True) as (figure, panels):
        panels = list(panels) if len(losses) > 1 else [panels]
        for axes, (name, values) in zip(panels, losses.items(), strict=True):
            # The first direction runs to the right; contours have it along the columns.
            surface = np.ma.masked_invalid(values.T)
            filled = axes.contourf(first, second, surface, levels=levels, norm=scale, cmap=theme.map)
            axes.contour(
                first, second, surface, levels=levels[1::3], norm=scale, colors=[theme.ink], linewidths=0.6, alpha=0.4
            )
            axes.plot(0.0, 0.0, "+", color=theme.orange, markersize=12, markeredgewidth=2.2)
            axes.set_aspect("equal")
            axes.grid(visible=False)
            axes.set_title(f"{name} loss", color=theme.ink, fontsize=11, loc="left")
            axes.set_xlabel(found["labels"][0])
            axes.xaxis.set_major_locator(MaxNLocator(6))
        panels[0].set_ylabel(found["labels"][1])
        ticks = levels[:: max(1, len(levels) // 7)]
        bar = figure.colorbar(filled, ax=panels, ticks=ticks, format="%.3g", shrink=0.92)
        bar.outline.set_edgecolor(theme.faint)
        bar.ax.minorticks_off()
    return png_of(figure)


def _array(values: Any) -> Array:
    """Numbers, and NaN for what JSON has none for."""
    return np.array(values, dtype=np.float64)
