"""The figure: error against seconds and against steps, the best final run of each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.autoencoder.settings import TITLES
from bench.autoencoder.summary import Record, summarise
from bench.theme import Theme, check_ending, dark, light, save_both

# Told apart by lightness and line style too, for print and for people who do not see red and green.
_LIGHT = {
    "sgd": "#d1620a", "adam": "#8a6d00", "kfac": "#0b62c4", "kfac-adaptive": "#7a3fb0", "ekfac": "#0f7d78",
}  # fmt: skip
_DARK = {
    "sgd": "#ffa65c", "adam": "#e3c44f", "kfac": "#62b0ff", "kfac-adaptive": "#c79bf2", "ekfac": "#4fd1c5",
}  # fmt: skip
THEMES = (light(_LIGHT), dark(_DARK))
_STYLES = {"sgd": "--", "adam": ":", "kfac": "-", "kfac-adaptive": "-.", "ekfac": (0, (6, 1, 1, 1, 1, 1))}


def draw(tuning: Sequence[Record], final: Sequence[Record], path: Path) -> list[Path]:
    """Write the light figure to `path` and the dark one beside it, as `<name>-dark<ending>`.

    Args:
        tuning: only for the target's sake.
        final: the runs that are drawn: of each method the one of lowest final error.
        path: ends in .svg or .png.

    Returns:
        The two paths.

    Raises:
        ValueError: there is no final run to draw, or the ending is another.
    """
    check_ending(path)
    summary = summarise(tuning, final)
    runs = [line.best for line in summary.lines if line.best is not None]
    if not runs:
        raise ValueError("figure: there is no finished final run to draw")
    target = summary.mark.error if summary.mark else None
    return save_both(lambda theme: _figure(runs, target, theme), THEMES, path)


def _figure(runs: Sequence[Record], target: float | None, theme: Theme) -> Figure:
    figure = theme.figure(10, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label in ((left, "seconds of training (evaluation left out)"), (right, "steps")):
        theme.dress(axes)
        axes.set_yscale("log")
        axes.set_xlabel(label, color=theme.ink)
        for run in runs:
            method = run.setting.method
            axes.plot(
                [point.seconds if axes is left else point.step for point in run.curve],
                [point.error for point in run.curve],
                color=theme.colours[method],
                linestyle=_STYLES[method],
                linewidth=2,
                label=TITLES[method],
            )
        if target is not None:
            axes.axhline(target, color=theme.ink, linewidth=0.8)
    lowest = min(run.final_error for run in runs)
    left.set_ylim(0.85 * lowest, 30 * lowest)  # all begin two orders of magnitude above where they are told apart
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    right.set_xscale("log")  # methods differ by an order of magnitude there
    left.set_ylabel("squared error per training image", color=theme.ink)
    if target is not None:
        left.annotate(
            "best final error of SGD and Adam", (0.01, target), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", color=theme.ink, fontsize=8.5,
        )  # fmt: skip
    left.legend(facecolor=theme.background, edgecolor=theme.faint, labelcolor=theme.ink, loc="upper right")
    return figure
