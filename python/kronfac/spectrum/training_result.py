"""What `through_training` returns, and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kronfac._plotting import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class TrainingSpectrumResult:
    """Eigenvalues, gradient norm and loss at c checkpoints of a training run.

    At a checkpoint whose loss or gradient is not finite the eigenvalues are NaN and not converged.

    Attributes:
        steps: how far training was (c,), float64, in the order given.
        unit: what the steps count: "step", "epoch", or "checkpoint" for their mere position.
        names: the files, or the positions of state dicts.
        losses: (c,), float64.
        gradient_norms: Euclidean norms of the loss's gradient (c,), float64.
        values: the eigenvalues (c, k), float64, in the order that was asked for.
        residuals: norms ‖Hv - λv‖ (c, k), or bounds on them: an exact eigenvalue lies within that of each value.
        converged: whether each residual met the tolerance, bool (c, k).
        traces: estimates of the trace (c,), float64; None unless asked for.
        trace_stderrs: their standard errors.
        products: products with single vectors that the values took, whether spent now or before.
        interrupted: a KeyboardInterrupt ended the work: later checkpoints are missing.
    """

    steps: Tensor
    unit: str
    names: tuple[str, ...]
    losses: Tensor
    gradient_norms: Tensor
    values: Tensor
    residuals: Tensor
    converged: Tensor
    traces: Tensor | None
    trace_stderrs: Tensor | None
    products: int
    interrupted: bool

    def rows(self) -> list[dict[str, Any]]:
        """The table: plain values per checkpoint, for a file or a data frame."""
        rows: list[dict[str, Any]] = []
        for index, name in enumerate(self.names):
            row: dict[str, Any] = {
                "checkpoint": name,
                self.unit if self.unit != "checkpoint" else "position": float(self.steps[index]),
                "loss": float(self.losses[index]),
                "gradient_norm": float(self.gradient_norms[index]),
                "eigenvalues": self.values[index].tolist(),
                "residuals": self.residuals[index].tolist(),
                "converged": self.converged[index].tolist(),
            }
            if self.traces is not None and self.trace_stderrs is not None:
                row |= {"trace": float(self.traces[index]), "trace_stderr": float(self.trace_stderrs[index])}
            rows.append(row)
        return rows

    def plot(self, ax: Axes | None = None, *, log: bool = False) -> Axes:
        """Draw the eigenvalues over the steps, and the gradient norm, dashed, with an axis of its own at the right.

        Bars show the residuals, hollow marks have not converged.

        Args:
            ax: axes to draw on; a new figure by default.
            log: logarithmic axes; eigenvalues that are zero or negative are then left out.

        Returns:
            The axes of the eigenvalues.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "TrainingSpectrumResult.plot")
        steps, order = self.steps.numpy(), np.argsort(self.steps.numpy(), kind="stable")
        values = self.values.numpy()
        if log:
            values = np.where(values > 0.0, values, np.nan)
        for rank in range(values.shape[1]):
            colour = f"C{rank % 10}"
            axes.plot(steps[order], values[order, rank], color=colour, linewidth=1.2)
            for met, face in ((True, colour), (False, "none")):
                shown = (self.converged[:, rank].numpy() == met) & np.isfinite(values[:, rank])
                axes.errorbar(
                    steps[shown],
                    values[shown, rank],
                    yerr=self.residuals.numpy()[shown, rank],
                    fmt="o",
                    markersize=4.0,
                    color=colour,
                    markerfacecolor=face,
                    capsize=2.0,
                )
        right: Any = axes.twinx()
        right.plot(steps[order], self.gradient_norms.numpy()[order], color="0.4", linewidth=1.2, linestyle="--")
        right.set_ylabel("gradient norm (dashed)")
        if log:
            axes.set_yscale("log")
            right.set_yscale("log")
        else:
            axes.axhline(0.0, color="0.8", linewidth=0.8, zorder=1)
        axes.set_xlabel(self.unit)
        axes.set_ylabel("eigenvalue")
        return axes  # type: ignore[no-any-return]
