"""The figure: accuracy, updates, curvature and robustness against the batch size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.large_batch.settings import TITLES
from bench.large_batch.summary import Record, cells
from bench.theme import Theme, dark, light, save_both

# Told apart by lightness, line style and marker too, for print and for people who do not see red and green.
_LIGHT = {"bl": "#d1620a", "fb": "#8a6d00", "gg": "#0f7d78", "abs": "#0b62c4", "absa": "#7a3fb0"}
_DARK = {"bl": "#ffa65c", "fb": "#e3c44f", "gg": "#4fd1c5", "abs": "#62b0ff", "absa": "#c79bf2"}
_STYLES = {"bl": "--", "fb": ":", "gg": "-.", "abs": "-", "absa": (0, (6, 1, 1, 1))}
_MARKS = {"bl": "o", "fb": "v", "gg": "s", "abs": "^", "absa": "D"}
_PANELS = (
    ("accuracy", "test accuracy in %", 100.0, False),
    ("updates", "updates", 1.0, True),
    ("eigenvalue", "top Hessian eigenvalue", 1.0, True),
    ("fgsm", "accuracy after FGSM in %", 100.0, False),
)


def draw(records: Sequence[Record], path: Path) -> list[Path]:
    """Write the light figure to `path` and the dark one beside it, as `<name>-dark<ending>`.

    Args:
        records: finished runs.
        path: ends in .svg or .png.

    Returns:
        The two paths.

    Raises:
        ValueError: there is no run to draw, or the ending is another.
    """
    if not records:
        raise ValueError("figure: there is no finished run to draw")
    return save_both(lambda theme: _figure(records, theme), (light(_LIGHT), dark(_DARK)), path)


def _figure(records: Sequence[Record], theme: Theme) -> Figure:
    figure = theme.figure(10, 6.4)
    table = cells(records)
    for axes, (name, label, scale, logarithmic) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        theme.dress(axes)
        axes.set_xscale("log", base=2)
        if logarithmic:
            axes.set_yscale("log")
        for method in TITLES:
            # A point of the runs that have the quantity; those that diverged have no curvature.
            points = [
                (batch, [scale * value for value in cell.values(name)])
                for (one, batch), cell in sorted(table.items())
                if one == method and cell.values(name)
            ]
            if not points:
                continue
            axes.errorbar(
                [batch for batch, _ in points],
                [statistics.fmean(values) for _, values in points],
                [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points],
                color=theme.colours[method],
                linestyle=_STYLES[method],
                marker=_MARKS[method],
                markersize=4,
                capsize=2,
                linewidth=1.6,
                label=TITLES[method],
            )
        if scale == 100.0:  # bars of one standard deviation reach beyond what there can be
            axes.set_ylim(0, 103)
        axes.set_xlabel("batch size (the largest, where it grows)", color=theme.ink)
        axes.set_ylabel(label, color=theme.ink)
        batches = sorted({batch for _, batch in table})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].legend(facecolor=theme.background, edgecolor=theme.faint, labelcolor=theme.ink)
    return figure
