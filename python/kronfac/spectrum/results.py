"""What the spectral methods return: frozen records that can draw themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from kronfac._plotting import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Ended: TypeAlias = Literal["finished", "limit", "interrupted"]
"""Why a search for eigenpairs ended: by itself, with all products spent, or by a KeyboardInterrupt."""

PairStatus: TypeAlias = Literal["converged", "limit", "interrupted", "stagnated"]
"""How an eigenpair came out."""


@dataclass(frozen=True, eq=False)
class EigenResult:
    """Eigenpairs of a symmetric operator.

    Attributes:
        values: eigenvalues (k,), in the order that was asked for. Fewer than k where the search ended before it had as
            many.
        vectors: unit eigenvectors as columns (n, k).
        residuals: norms ‖Av - λv‖ (k,), or bounds on them: `measured` says which. An exact eigenvalue lies within the
            residual of each value.
        converged: whether each residual met the tolerance, bool (k,).
        products: products with single vectors that were spent, those for the residuals included.
        ended: why the search did: "finished", "limit" or "interrupted". Where it did not finish, converged pairs are
            eigenpairs all the same, but others that are wanted more may not have been seen yet.
        measured: whether each vector was multiplied once more for its residual. Otherwise residuals are bounds: what
            the recurrence says, plus a bound on its round-off (from few products, see `residuals` of `eigsh`; of an
            interrupted search, which spends no more products, a multiple of the unit round-off).
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int
    ended: Ended = "finished"
    measured: bool = True

    @property
    def interrupted(self) -> bool:
        """Whether a KeyboardInterrupt ended the search."""
        return self.ended == "interrupted"

    @property
    def status(self) -> list[PairStatus]:
        """Of each pair: "converged", or why not: "limit", "interrupted", or "stagnated" where round-off keeps the
        residual above a tolerance that the method took for met.
        """
        otherwise: PairStatus = "stagnated" if self.ended == "finished" else self.ended
        return ["converged" if met else otherwise for met in self.converged.tolist()]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues against their rank; bars show the residuals, hollow marks have not converged.

        Args:
            ax: axes to draw on; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "EigenResult.plot")
        values, residuals = self.values.cpu().numpy(), self.residuals.cpu().numpy()
        converged = self.converged.cpu().numpy()
        rank = np.arange(1, len(values) + 1)
        axes.vlines(rank, 0.0, values, color="0.8", linewidth=1.0, zorder=1)
        axes.axhline(0.0, color="0.5", linewidth=0.8, zorder=1)
        for mask, face, label in ((converged, "C0", "converged"), (~converged, "none", "not converged")):
            if mask.any():
                axes.errorbar(
                    rank[mask],
                    values[mask],
                    yerr=residuals[mask],
                    fmt="o",
                    color="C0",
                    markerfacecolor=face,
                    capsize=2.0,
                    label=label,
                )
        if not converged.all():
            axes.legend()
        axes.set_xlabel("rank")
        axes.set_ylabel("eigenvalue")
        axes.xaxis.get_major_locator().set_params(integer=True)
        return axes  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class TraceResult:
    """A stochastic estimate of a trace.

    Attributes:
        value: the estimate.
        stderr: its standard error; the truth lies within two of them in about 95 % of all cases.
        products: products with single vectors that were spent.
        samples: the single estimates, float64; `value` is their mean. vᵀAv per probe for "hutchinson"; those of
            "hutch++" share the trace of the sketch, and each of "xtrace" leaves one probe out of it.
        method: how it was estimated.
        interrupted: whether a KeyboardInterrupt ended it with fewer probes than asked for.
        converged: whether the standard error met the target that was asked for; True where none was.
    """

    value: float
    stderr: float
    products: int
    samples: Tensor
    method: str = "hutchinson"
    interrupted: bool = False
    converged: bool = True

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the running mean over the samples with a band of two standard errors.

        Args:
            ax: axes to draw on; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "TraceResult.plot")
        samples = self.samples.cpu().numpy()
        count = np.arange(1, len(samples) + 1)
        mean = np.cumsum(samples) / count
        # Welford's sums would be safer for samples of huge mean; for a picture the two-pass form on prefixes is exact.
        spread = np.array([samples[:used].std(ddof=1) if used > 1 else np.nan for used in count])
        band = 2.0 * spread / np.sqrt(count)
        low, high = mean - band, mean + band
        axes.fill_between(count, low, high, color="C0", alpha=0.2, linewidth=0.0, label="±2 standard errors")
        axes.plot(count, mean, color="C0", label="running mean")
        axes.set_xlabel("probes" if self.method == "hutchinson" else f"samples of {self.method}")
        axes.set_ylabel("trace")
        axes.set_xlim(1, max(2, len(samples)))
        axes.legend()
        return axes  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class DiagonalResult:
    """A stochastic estimate of a diagonal.

    Attributes:
        values: the estimate (n,), float64.
        stderr: the standard error of each entry (n,), float64; 0 where it was computed exactly.
        products: products with single vectors that were spent.
        method: how it was estimated.
        interrupted: whether a KeyboardInterrupt ended it with fewer probes than asked for.
    """

    values: Tensor
    stderr: Tensor
    products: int
    method: str
    interrupted: bool = False

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the entries in descending order with a band of two standard errors.

        Args:
            ax: axes to draw on; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "DiagonalResult.plot")
        values, order = self.values.sort(descending=True)
        value, band = values.numpy(), 2.0 * self.stderr[order].numpy()
        rank = np.arange(1, len(value) + 1)
        axes.fill_between(rank, value - band, value + band, color="C0", alpha=0.2, label="±2 standard errors")
        axes.plot(rank, value, color="C0", linewidth=1.0)
        axes.axhline(0.0, color="0.5", linewidth=0.8, zorder=1)
        axes.set_xlabel("rank")
        axes.set_ylabel("diagonal entry")
        axes.legend()
        return axes  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BlockTraceResult:
    """What one block of a curvature matrix adds up to.

    Attributes:
        size: parameters of the block, n_l.
        trace: estimate of tr H_ll.
        trace_stderr: its standard error.
        squared_frobenius: estimate of the squared Frobenius norm of the block's rows of the whole matrix; of the block
            itself where it was probed alone.
        squared_frobenius_stderr: its standard error.
        restricted: whether the block was probed alone.
        products: products with single vectors; shared by all blocks where these were not probed alone.
        interrupted: whether a KeyboardInterrupt ended the estimate with fewer probes than asked for.
        converged: whether the standard error of this trace met the target that was asked for; True where none was.
    """

    size: int
    trace: float
    trace_stderr: float
    squared_frobenius: float
    squared_frobenius_stderr: float
    restricted: bool
    products: int
    interrupted: bool = False
    converged: bool = True

    @property
    def mean_eigenvalue(self) -> float:
        """The trace over the number of parameters: what layers of different sizes are compared by."""
        return self.trace / self.size


@dataclass(frozen=True)
class DensityChecks:
    """Trace and Frobenius norm estimated apart from a density, with other probes, to compare with what it implies.

    Attributes:
        trace: the mean of zᵀAz over these probes.
        trace_stderr: its standard error.
        squared_frobenius: the mean of ‖Az‖².
        squared_frobenius_stderr: its standard error.
        trace_score: the difference of the implied trace from this one, in standard errors of the difference.
        squared_frobenius_score: the same for the squared Frobenius norm.
        products: products with single vectors that were spent.
    """

    trace: float
    trace_stderr: float
    squared_frobenius: float
    squared_frobenius_stderr: float
    trace_score: float
    squared_frobenius_score: float
    products: int

    @property
    def agree(self) -> bool:
        """Whether both lie within 4 standard errors: by chance alone, few in a thousand do not."""
        return abs(self.trace_score) <= 4.0 and abs(self.squared_frobenius_score) <= 4.0


@dataclass(frozen=True, eq=False)
class DensityResult:
    """A spectral density estimated by stochastic Lanczos quadrature.

    Attributes:
        grid: points (g,) at which the density is given, ascending, float64.
        values: the density (g,) at these points; its integral is 1.
        nodes: quadrature nodes (Ritz values) of all probes, ascending, float64.
        weights: their weights, summing to 1. Nodes and weights are the estimate before broadening.
        sigma: standard deviation of the Gaussian that each node is broadened by.
        trace: the trace that nodes and weights imply, n Σ wθ.
        trace_stderr: its standard error over the probes.
        squared_frobenius: the squared Frobenius norm they imply, n Σ wθ².
        squared_frobenius_stderr: its standard error over the probes.
        products: products with single vectors that were spent.
        residuals: of the nodes' Ritz pairs: an eigenvalue lies within that of each node.
        checks: independent estimates of trace and Frobenius norm, where they were asked for.
        interrupted: a KeyboardInterrupt ended the work: fewer steps or probes than asked for. Standard errors are
            infinite where only one probe was done.
    """

    grid: Tensor
    values: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float
    trace: float
    trace_stderr: float
    squared_frobenius: float
    squared_frobenius_stderr: float
    products: int
    residuals: Tensor | None = None
    checks: DensityChecks | None = None
    interrupted: bool = False

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density on a logarithmic axis, where single eigenvalues far from the bulk still show.

        Args:
            ax: axes to draw on; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "DensityResult.plot")
        grid, values = self.grid.cpu().numpy(), self.values.cpu().numpy()
        # The peak of a single node of the least weight that matters: below its foot there is nothing to see.
        weights = self.weights.cpu().numpy()
        least = float(weights[weights > 1e-12 * weights.max()].min())
        floor = max(1e-2 * least / (self.sigma * np.sqrt(2.0 * np.pi)), 1e-9 * float(values.max()))
        axes.fill_between(grid, floor, np.maximum(values, floor), color="C0", alpha=0.2, linewidth=0.0)
        axes.plot(grid, np.maximum(values, floor), color="C0", linewidth=1.2)
        axes.set_yscale("log")
        axes.set_ylim(floor, 3.0 * float(values.max()))
        axes.set_xlim(float(grid[0]), float(grid[-1]))
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel(f"density (σ = {self.sigma:.2g})")
        return axes  # type: ignore[no-any-return]
