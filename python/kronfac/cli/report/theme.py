"""Colours and axes that the figures of all reports share; each figure is drawn in a light and a dark variant."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kronfac.cli.errors import RunError

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import PercentFormatter as PercentFormatter
except ModuleNotFoundError:
    raise RunError("plots need matplotlib; run `pip install 'kronfac[demo]'`") from None

_DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of one variant.

    Attributes:
        background: of figure and axes.
        ink: text and axes.
        soft: text of less weight.
        faint: grid lines.
        blue: the first colour; told apart from the other by lightness too, and by people who do not see red and green.
        orange: the second one.
        map: name of matplotlib's colour map for surfaces, from what is close to the background to what is not.
    """

    background: str
    ink: str
    soft: str
    faint: str
    blue: str
    orange: str
    map: str

    @property
    def colours(self) -> dict[str, str]:
        """By optimizer."""
        return {"sgd": self.orange, "kfac": self.blue}


LIGHT = Theme("#ffffff", "#1f2430", "#5b6473", "#d9dde5", "#0b62c4", "#d1620a", "YlGnBu")
DARK = Theme("#171b23", "#e4e8f0", "#9aa5b6", "#39414f", "#62b0ff", "#ffa65c", "YlGnBu_r")


@contextmanager
def axes_of(
    theme: Theme,
    panels: int = 1,
    size: tuple[float, float] = (6.6, 4.2),
    widths: tuple[float, ...] | None = None,
    **options: Any,
) -> Iterator[tuple[Figure, Any]]:
    """A figure in a theme's colours.

    Args:
        theme: colours.
        panels: axes beside each other.
        size: in inches.
        widths: of the panels, relative to each other.
        options: for `Figure.subplots`.

    Yields:
        The figure, and its axes or a list of them.
    """
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.grid": True,
        "axes.grid.which": "major",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.faint,
        "grid.linewidth": 0.7,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
    }
    # Not pyplot: no global figure list, no display, and the caller's own settings stay as they are.
    with matplotlib.rc_context(style):
        # Room between the last number of one axis and the first of the next.
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.05))
        FigureCanvasAgg(figure)
        found = figure.subplots(1, panels, squeeze=False, width_ratios=widths, **options)[0]
        yield figure, found if panels > 1 else found[0]


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def density_curve(axes: Any, spectrum: Mapping[str, Any], colour: str, theme: Theme) -> None:
    """Draw the density of a spectrum on a logarithmic axis, with ticks at the leading eigenvalues.

    Args:
        axes: to draw on.
        spectrum: as `kronfac.cli.analysis.Spectrum.as_dict` gives it.
        colour: of the curve.
        theme: the other colours.
    """
    grid, values = spectrum["density"]["grid"], spectrum["density"]["values"]
    # An eigenvalue of multiplicity one is a Gaussian of this height; far below it there is nothing to see.
    single = 1.0 / (spectrum["parameters"] * spectrum["density"]["sigma"] * (2 * 3.141592653589793) ** 0.5)
    floor = 0.03 * single
    shown = [max(value, floor) for value in values]
    axes.fill_between(grid, floor, shown, color=colour, alpha=0.22, linewidth=0)
    axes.plot(grid, shown, color=colour, linewidth=1.3)
    top = spectrum["top_eigenvalues"]
    if top:
        axes.plot(
            top, [floor * 1.6] * len(top), "|", color=theme.ink, markersize=9, label=f"top {len(top)} eigenvalues"
        )
    axes.set_yscale("log")
    axes.set_ylim(floor, 4 * max(values))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
