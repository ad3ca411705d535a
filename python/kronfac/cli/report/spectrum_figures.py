"""Figures of `kronfac spectrum`, drawn from the contents of spectrum.json alone, in a light and a dark variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kronfac.cli.report.landscape_figure import draw_landscape
from kronfac.cli.report.theme import LIGHT, MaxNLocator, Theme, axes_of, density_curve, png_of

MOST_LAYERS = 30
"""Layers in the figure; the table of the page has all of them."""

NAMES = ("eigenvalues", "trace", "layers", "density", "decades", "landscape")
"""Of all figures that a report may have."""

Report = Mapping[str, Any]


def draw_all(report: Report, theme: Theme = LIGHT) -> dict[str, bytes]:
    """Draw every figure that there are results for.

    Args:
        report: the contents of spectrum.json.
        theme: colours.

    Returns:
        PNG files by name without ending.
    """
    figures: dict[str, tuple[Callable[[Report, Theme], bytes], Any]] = {
        "eigenvalues": (eigenvalues, report["top_eigenvalues"]),
        "trace": (trace, len(report["trace_samples"] or ()) >= 2),
        "layers": (layers, report["layers"]),
        "density": (density, report["density"]),
        "decades": (decades, report["density"] and report["density"]["log"]),
        "landscape": (draw_landscape, report["landscape"]),
    }
    return {name: draw(report, theme) for name, (draw, there) in figures.items() if there}


def eigenvalues(report: Report, theme: Theme) -> bytes:
    """The eigenvalues with bars of one residual, and the residuals beside their tolerance."""
    values, residuals = report["top_eigenvalues"], report["residuals"]
    relative, converged = report["relative_residuals"], report["converged"]
    ranks = range(1, len(values) + 1)
    with axes_of(theme, panels=2, size=(10.4, 3.9), widths=(1.35, 1.0)) as (figure, (left, right)):
        left.axhline(0.0, color=theme.ink, linewidth=0.8)
        left.vlines(ranks, 0.0, values, color=theme.blue, alpha=0.28, linewidth=_stem(len(values)))
        for state, face in ((True, theme.blue), (False, theme.background)):
            mine = [index for index, one in enumerate(converged) if one is state]
            left.errorbar(
                [ranks[index] for index in mine],
                [values[index] for index in mine],
                yerr=[residuals[index] for index in mine],
                fmt="o",
                markersize=5.5,
                color=theme.blue,
                markerfacecolor=face,
                ecolor=theme.orange,
                elinewidth=1.4,
                capsize=3.0,
            )
        left.set_xlabel("rank")
        left.set_ylabel("eigenvalue ± residual")
        # A residual of exactly 0 has no place on a logarithmic axis; that of a tiny problem may be.
        shown = [max(one, 1e-17) for one in relative]
        right.plot(ranks, shown, "o", color=theme.orange, markersize=5.0)
        right.vlines(ranks, min(*shown, report["tol"]) / 3, shown, color=theme.orange, alpha=0.28, linewidth=1.6)
        right.axhline(report["tol"], color=theme.ink, linewidth=1.1, linestyle=(0, (4, 3)))
        right.annotate(
            f"tolerance {report['tol']:g}",
            (1.0, report["tol"]),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=theme.soft,
        )
        right.set_yscale("log")
        right.set_ylim(min(*shown, report["tol"]) / 3, max(*shown, report["tol"]) * 3)
        right.set_xlabel("rank")
        right.set_ylabel("residual / largest |eigenvalue|")
        for axes in (left, right):
            axes.grid(visible=False, axis="x")
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
            axes.set_xlim(0.4, len(values) + 0.6)
    return png_of(figure)


def trace(report: Report, theme: Theme) -> bytes:
    """The running mean of the samples, with a band of two standard errors."""
    samples = report["trace_samples"]
    counts, means, bands = [], [], []
    total = squares = 0.0
    centre = samples[0]  # differences to it: the squares of samples far from 0 would cancel
    for count, sample in enumerate(samples, start=1):
        total += sample - centre
        squares += (sample - centre) ** 2
        if count > 1:
            counts.append(count)
            means.append(centre + total / count)
            variance = max(0.0, squares - total * total / count) / (count - 1)
            bands.append(2.0 * math.sqrt(variance / count))
    with axes_of(theme) as (figure, axes):
        axes.plot(range(1, len(samples) + 1), samples, ".", color=theme.blue, alpha=0.35, markersize=4)
        low = [mean - band for mean, band in zip(means, bands, strict=True)]
        high = [mean + band for mean, band in zip(means, bands, strict=True)]
        axes.fill_between(counts, low, high, color=theme.blue, alpha=0.2, linewidth=0, label="± 2 standard errors")
        axes.plot(counts, means, color=theme.blue, linewidth=2.0, label="mean so far")
        axes.set_xlabel("probes" if report["trace_method"] == "hutchinson" else f"samples of {report['trace_method']}")
        axes.set_ylabel("trace")
        axes.set_xlim(1, len(samples))
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return png_of(figure)


def layers(report: Report, theme: Theme) -> bytes:
    """Traces with two standard errors, and the largest eigenvalue of every block."""
    shown = report["layers"][:MOST_LAYERS]
    panels = [("trace", _doubled(shown, "trace_stderr"), theme.blue, "trace of the block ± 2 standard errors")]
    panels += [("top_eigenvalue", _plain(shown, "residual"), theme.orange, "largest eigenvalue of the block")]
    panels = [panel for panel in panels if any(panel[0] in layer for layer in shown)]
    height = 1.1 + 0.34 * len(shown)
    with axes_of(theme, panels=len(panels), size=(10.4, max(2.2, height)), sharey=True) as (figure, found):
        for axes, (key, errors, colour, label) in zip(found if len(panels) > 1 else [found], panels, strict=True):
            values = [layer.get(key, math.nan) for layer in shown]
            places = range(len(shown))
            axes.barh(places, values, color=colour, alpha=0.75, height=0.62)
            axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=theme.ink, elinewidth=1.2, capsize=3.0)
            axes.axvline(0.0, color=theme.ink, linewidth=0.8)
            axes.set_xlabel(label)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4), useMathText=True)
            axes.set_yticks(list(places), [_short(layer) for layer in shown])
            axes.set_ylim(len(shown) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
    return png_of(figure)


def density(report: Report, theme: Theme) -> bytes:
    """The spectral density, with ticks at the leading eigenvalues."""
    with axes_of(theme, size=(10.4, 4.2)) as (figure, axes):
        density_curve(axes, report, theme.blue, theme)
        axes.set_xlabel(f"eigenvalue (broadened by σ = {report['density']['sigma']:.2g})")
        axes.set_ylabel("density")
        if report["top_eigenvalues"]:
            axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return png_of(figure)


def decades(report: Report, theme: Theme) -> bytes:
    """The density over the decades of |λ|, of positive and negative eigenvalues apart."""
    found = report["density"]["log"]
    places = [10.0**place for place in found["grid"]]
    highest = max(*found["positive"], *found["negative"])
    # As on the linear axis: a small part of what one single eigenvalue gives.
    floor = 0.03 / (report["parameters"] * found["sigma"] * (2 * math.pi) ** 0.5)
    with axes_of(theme, size=(10.4, 4.2)) as (figure, axes):
        for name, sign, colour in (("positive", ">", theme.blue), ("negative", "<", theme.orange)):
            mass = found[f"{name}_mass"]
            if mass > 0:
                shown = [max(value, floor) for value in found[name]]
                axes.fill_between(places, floor, shown, color=colour, alpha=0.22, linewidth=0)
                axes.plot(places, shown, color=colour, linewidth=1.4, label=f"λ {sign} 0: {mass:.1%}")
        for mass, label in (
            (found["zero_mass"], f"|λ| < {found['threshold']:.1g}"),
            (found["uncertain_mass"], "decade or sign uncertain"),
        ):
            if mass > 0.0005:
                axes.plot([], [], " ", label=f"{label}: {mass:.1%}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(floor, 4 * max(highest, floor))
        axes.set_xlim(places[0], places[-1])
        axes.set_xlabel(f"|eigenvalue| (broadened by {found['sigma']:.2g} decades)")
        axes.set_ylabel("density per decade")
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return png_of(figure)


def _stem(count: int) -> float:
    """Width of the lines from 0 to the values, in points."""
    return max(1.0, min(6.0, 150.0 / count))


def _doubled(shown: list[Any], key: str) -> list[float]:
    return [2.0 * error for error in _plain(shown, key)]


def _plain(shown: list[Any], key: str) -> list[float]:
    return [layer.get(key, 0.0) for layer in shown]


def _short(layer: Mapping[str, Any]) -> str:
    """Name and kind; of a long name the end, which is what tells layers apart."""
    name = layer["name"] if len(layer["name"]) <= 34 else "…" + layer["name"][-33:]
    return name if layer["kind"] in (None, name) else f"{name}  {layer['kind']}"
