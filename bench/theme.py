"""Figures in a light and a dark variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of one variant: background, text and axes, grid, and one per method."""

    background: str
    ink: str
    faint: str
    colours: dict[str, str]

    def figure(self, width: float, height: float) -> Figure:
        """An empty figure in inches."""
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure

    def dress(self, axes: Any) -> None:
        """Colour axes, grid, ticks and borders."""
        axes.set_facecolor(self.background)
        axes.grid(True, which="both", color=self.faint, linewidth=0.5)
        axes.tick_params(which="both", colors=self.ink)
        for spine in axes.spines.values():
            spine.set_color(self.faint)


def light(colours: dict[str, str]) -> Theme:
    """The light variant, with the colours of the methods."""
    return Theme("#ffffff", "#1f2430", "#d9dde5", colours)


def dark(colours: dict[str, str]) -> Theme:
    """The dark variant, with the colours of the methods."""
    return Theme("#0d1117", "#e4e8f0", "#39414f", colours)


def check_ending(path: Path) -> None:
    """Raise ValueError unless a path ends in .svg or .png."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"figure: expected a name that ends in .svg or .png, got {path.name!r}")


def save_both(make: Callable[[Theme], Figure], themes: tuple[Theme, Theme], path: Path) -> list[Path]:
    """Write the light figure to `path` and the dark one beside it, as `<name>-dark<ending>`.

    Raises:
        ValueError: the ending is another than .svg or .png.
    """
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path, path.with_name(f"{path.stem}-dark{path.suffix}")]
    for theme, target in zip(themes, paths, strict=True):
        make(theme).savefig(
            target, dpi=160, facecolor=theme.background, metadata={"Date": None} if path.suffix == ".svg" else None
        )
    return paths
