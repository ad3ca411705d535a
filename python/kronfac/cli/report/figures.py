"""Figures of the report, drawn from the contents of report.json alone, in a light and a dark variant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kronfac.cli.report.theme import DARK as DARK
from kronfac.cli.report.theme import LIGHT as LIGHT
from kronfac.cli.report.theme import PercentFormatter, Theme, axes_of, density_curve, png_of

NAMES = {"sgd": "SGD + momentum", "kfac": "K-FAC"}


def draw_all(report: dict[str, Any], theme: Theme = LIGHT) -> dict[str, bytes]:
    """Draw every figure.

    Args:
        report: the contents of report.json.
        theme: colours.

    Returns:
        PNG files by name without ending.
    """
    figures: dict[str, Callable[[dict[str, Any], Theme], bytes]] = {
        "loss_steps": loss_against_steps,
        "loss_seconds": loss_against_seconds,
        "accuracy": accuracy_against_steps,
        "rates": loss_against_rates,
        "density": densities,
    }
    return {name: draw(report, theme) for name, draw in figures.items()}


def loss_against_steps(report: dict[str, Any], theme: Theme) -> bytes:
    """Training loss, all seeds and their median, with SGD's final loss as a line to cross."""
    with axes_of(theme) as (figure, axes):
        _loss_curves(axes, report, theme, lambda run: _steps(run))
        summary = report["summary"]
        reached = summary["kfac_epochs_to_sgd_final_loss"]
        if reached is not None:
            steps = _median(report, "kfac", _steps)[reached]
            loss = _median(report, "kfac", _losses)[reached]
            axes.plot([steps], [loss], "o", color=theme.colours["kfac"], markersize=9, markerfacecolor="none", mew=1.8)
            axes.annotate(
                f"K-FAC there after {reached} of {summary['epochs']} epochs",
                (steps, loss),
                xytext=(0.04, 0.06),
                textcoords="axes fraction",
                arrowprops={"arrowstyle": "-", "color": theme.ink, "linewidth": 0.7, "shrinkB": 6},
                color=theme.ink,
                fontsize=9.5,
            )
        axes.set_xlabel("optimizer steps")
    return png_of(figure)


def loss_against_seconds(report: dict[str, Any], theme: Theme) -> bytes:
    """Training loss against the time spent training."""
    with axes_of(theme) as (figure, axes):
        _loss_curves(axes, report, theme, lambda run: [0.0, *run["seconds_at_epoch"]])
        axes.set_xlabel("seconds of training (evaluation left out)")
    return png_of(figure)


def accuracy_against_steps(report: dict[str, Any], theme: Theme) -> bytes:
    """Test accuracy, with the vertical axis cut at what all runs are above in their second half."""
    with axes_of(theme) as (figure, axes):
        lowest = 1.0
        for optimizer, runs in _by_optimizer(report):
            for run in runs:
                axes.plot(_steps(run)[1:], run["test_accuracy"], color=theme.colours[optimizer], alpha=0.3, linewidth=1)
                lowest = min(lowest, *run["test_accuracy"][len(run["test_accuracy"]) // 2 :])
            curve = _median(report, optimizer, lambda run: run["test_accuracy"])
            axes.plot(_steps(runs[0])[1 : len(curve) + 1], curve, color=theme.colours[optimizer], linewidth=2.2)
        axes.set_ylim(max(0.0, min(0.9, lowest - 0.01)), 1.002)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("test accuracy")
        _legend(axes, theme)
    return png_of(figure)


def loss_against_rates(report: dict[str, Any], theme: Theme) -> bytes:
    """Every setting that was tried: final training loss against the rate."""
    with axes_of(theme) as (figure, axes):
        dampings = sorted({c["damping"] for c in report["grid"] if c["optimizer"] == "kfac"})
        series = [("sgd", None, "o", "-")]
        series += [("kfac", d, m, s) for d, m, s in zip(dampings, "sD^vP*", ["-", "--", ":", "-."] * 2, strict=False)]
        for optimizer, damping, marker, line in series:
            tried = [c for c in report["grid"] if c["optimizer"] == optimizer and c.get("damping") == damping]
            # A setting of which the median run diverged has no place on this axis.
            tried = sorted((c for c in tried if c["median_final_train_loss"] is not None), key=lambda c: c["lr"])
            label = NAMES[optimizer] + ("" if damping is None else f", damping {damping:g}")
            axes.plot(
                [c["lr"] for c in tried],
                [c["median_final_train_loss"] for c in tried],
                marker=marker,
                linestyle=line,
                color=theme.colours[optimizer],
                label=label,
            )
            for c in tried:
                losses = [loss for loss in c["final_train_loss"] if loss is not None]
                axes.plot([c["lr"]] * len(losses), losses, ".", color=theme.colours[optimizer], alpha=0.4, markersize=4)
        for optimizer, chosen in report["chosen"].items():
            axes.plot(
                [chosen["lr"]],
                [chosen["median_final_train_loss"]],
                "o",
                markersize=14,
                markerfacecolor="none",
                color=theme.colours[optimizer],
                mew=1.8,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("learning rate (circled: chosen)")
        axes.set_ylabel("final training loss")
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return png_of(figure)


def densities(report: dict[str, Any], theme: Theme) -> bytes:
    """The spectral density of each result, with ticks at the leading eigenvalues."""
    spectra = [s for s in report["spectra"] if s["density"] is not None]
    with axes_of(theme, panels=max(1, len(spectra)), size=(10.4, 4.0)) as (figure, panels):
        for axes, spectrum in zip(panels, spectra, strict=False):
            colour = theme.colours[spectrum["optimizer"]]
            density_curve(axes, spectrum, colour, theme)
            axes.set_title(NAMES[spectrum["optimizer"]], color=theme.ink, fontsize=11, loc="left")
            axes.set_xlabel("eigenvalue of the Hessian")
            axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
        panels[0].set_ylabel("density")
    return png_of(figure)


def _loss_curves(axes: Any, report: dict[str, Any], theme: Theme, at: Callable[[Any], list[float]]) -> None:
    for optimizer, runs in _by_optimizer(report):
        colour = theme.colours[optimizer]
        for run in runs:
            axes.plot(at(run), _losses(run), color=colour, alpha=0.3, linewidth=1)
        curve = _median(report, optimizer, _losses)
        axes.plot(_median(report, optimizer, at), curve, color=colour, linewidth=2.2)
    target = report["summary"]["sgd_final_train_loss"]
    axes.axhline(target, color=theme.colours["sgd"], linestyle=(0, (4, 3)), linewidth=1.1)
    axes.set_yscale("log")
    axes.set_ylabel("training loss (whole training set)")
    axes.set_xlim(left=0)
    _legend(axes, theme, ("SGD's final loss", theme.colours["sgd"]))


def _legend(axes: Any, theme: Theme, *dashed: tuple[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=theme.colours[name], linewidth=2.2, label=NAMES[name]) for name in NAMES]
    handles += [Line2D([], [], color=c, linestyle=(0, (4, 3)), linewidth=1.1, label=label) for label, c in dashed]
    handles.append(Line2D([], [], color=theme.ink, alpha=0.4, linewidth=1, label="single seeds"))
    axes.legend(handles=handles, frameon=False, labelcolor=theme.ink, fontsize=9)


def _by_optimizer(report: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for optimizer in NAMES:
        runs = [run for run in report["runs"] if run["optimizer"] == optimizer]
        if runs:
            yield optimizer, runs


def _median(report: dict[str, Any], optimizer: str, values: Callable[[Any], Sequence[float]]) -> list[float]:
    runs = [run for run in report["runs"] if run["optimizer"] == optimizer]
    return [statistics.median(column) for column in zip(*map(values, runs), strict=False)]


def _steps(run: dict[str, Any]) -> list[float]:
    per_epoch = run["steps"] / max(1, run["epochs"])
    return [per_epoch * epoch for epoch in range(run["epochs"] + 1)]


def _losses(run: dict[str, Any]) -> list[float]:
    return [run["initial_train_loss"], *run["train_loss"]]
