"""What `kronfac.cli.analysis` is asked for and returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kronfac.spectrum import (
    BlockTraceResult,
    DensityResult,
    EigenResult,
    LandscapeResult,
    LogDensityResult,
    TraceResult,
)


@dataclass(frozen=True)
class SpectrumOptions:
    """What to compute.

    Attributes:
        operator: "hessian", "ggn" or "fisher".
        fisher: "mc", "exact" or "empirical".
        top: how many eigenvalues.
        which: "magnitude", "largest" or "both", as in `kronfac.spectrum.eigsh`.
        tol: tolerance of their residuals relative to the largest.
        multiplicity: search for further copies of repeated eigenvalues, which costs about as much again.
        trace: "hutchinson", "hutch++", "xtrace", or None for no trace.
        trace_probes: products to spend on it; with `precision` the most to spend, None for 10,000.
        precision: the standard error to reach, as a share of the trace; with `layers`, for every layer, of the largest.
        layers: trace, Frobenius norm and largest eigenvalue of every layer's block.
        density: axis of the spectral density, "linear" or "log", or None for no density.
        density_probes: its probes.
        density_steps: Lanczos steps per probe.
        landscape: along how many of the first eigenvectors to look at the loss, 0, 1 or 2.
        landscape_points: coordinates along each.
        landscape_radius: how far to go, a distance in the space of the parameters.
        landscape_test: test examples for it, None for all.
        double: compute the eigenvalues in float64. Where a network is nearly certain of every example, the Hessian of
            the cross-entropy is made of differences 1 - p, of which float32 knows a few digits only.
        seed: of all random vectors.
    """

    operator: str = "hessian"
    fisher: str = "mc"
    top: int = 10
    which: str = "magnitude"
    tol: float = 1e-4
    multiplicity: bool = True
    trace: str | None = "hutchinson"
    trace_probes: int | None = 100
    precision: float | None = None
    layers: bool = False
    density: str | None = "linear"
    density_probes: int = 10
    density_steps: int = 80
    landscape: int = 0
    landscape_points: int | None = None
    landscape_radius: float = 1.0
    landscape_test: int | None = None
    double: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One part of the analysis.

    Attributes:
        name: what was computed.
        status: "done", "partial" (ended by Ctrl-C, with a result), "left out" (ended or not begun, without one) or
            "failed".
        products: products with single vectors that it took.
        seconds: that it took.
        error: why it failed.
    """

    name: str
    status: str
    products: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Layer:
    """The diagonal block of one layer.

    Attributes:
        name: of the module or group.
        kind: class of the module, or None for a group.
        traces: trace and squared Frobenius norm of the layer's rows, or None.
        eigen: the eigenpair of largest magnitude of its block, or None.
    """

    name: str
    kind: str | None
    traces: BlockTraceResult | None
    eigen: EigenResult | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        result: dict[str, Any] = {"name": self.name, "kind": self.kind}
        found = self.traces
        if found is not None:
            norm = math.sqrt(found.squared_frobenius)
            result |= {
                "parameters": found.size,
                "trace": found.trace,
                "trace_stderr": found.trace_stderr,
                "mean_eigenvalue": found.mean_eigenvalue,
                "frobenius": norm,
                # The square's error over the derivative of the square.
                "frobenius_stderr": found.squared_frobenius_stderr / (2 * norm) if norm > 0 else 0.0,
            }
        if self.eigen is not None:
            result |= {
                "parameters": self.eigen.vectors.shape[0],
                "top_eigenvalue": float(self.eigen.values[0]),
                "residual": float(self.eigen.residuals[0]),
                "converged": bool(self.eigen.converged[0]),
            }
        return result


@dataclass(frozen=True)
class Spectrum:
    """Results with their errors; None for what was not asked for, or not reached before Ctrl-C.

    Attributes:
        options: what was asked for.
        examples: examples that the curvature is averaged over.
        parameters: size of the matrix.
        eigen: leading eigenpairs.
        trace: of the whole matrix.
        layers: of each layer, by descending magnitude of the trace.
        density: of the whole matrix.
        landscape: the loss along the first eigenvectors.
        stages: what was done, in order.
        seconds: of all computations.
    """

    options: SpectrumOptions
    examples: int
    parameters: int
    eigen: EigenResult | None
    trace: TraceResult | BlockTraceResult | None
    layers: list[Layer] | None
    density: DensityResult | LogDensityResult | None
    landscape: LandscapeResult | None
    stages: list[Stage]
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it before all was computed."""
        return any(stage.status in ("partial", "left out") for stage in self.stages)

    @property
    def failures(self) -> list[str]:
        """What failed, and why."""
        return [f"{stage.name}: {stage.error}" for stage in self.stages if stage.error is not None]

    @property
    def relative_residuals(self) -> list[float]:
        """Residuals ‖Hv - λv‖ over the largest |λ|."""
        if self.eigen is None:
            return []
        scale = float(self.eigen.values.abs().max())
        return [residual / scale if scale > 0 else residual for residual in self.eigen.residuals.tolist()]

    @property
    def linear_density(self) -> DensityResult | None:
        """The density over λ, which there is of that over the decades too."""
        return self.density.linear if isinstance(self.density, LogDensityResult) else self.density

    @property
    def notes(self) -> list[str]:
        """What a reader has to know before relying on the figures."""
        notes = [f"Failed: {failure}" for failure in self.failures]
        if self.interrupted:
            states = [
                f"{stage.name} {stage.status}" for stage in self.stages if stage.status in ("partial", "left out")
            ]
            notes.append(f"Interrupted: {', '.join(states)}. Estimates are of what had been computed.")
        if self.eigen is not None and not self.eigen.converged.all():
            count = int((~self.eigen.converged).sum())
            why = {
                "limit": "the products allowed were spent",
                "interrupted": "interrupted; their residuals are bounds",
                "finished": "round-off keeps their residuals above it: raise --tol, or add --double",
            }[self.eigen.ended]
            notes.append(f"{count} of {len(self.eigen.converged)} eigenpairs did not reach the tolerance ({why}).")
        missed = [layer.name for layer in self.layers or [] if layer.eigen and not layer.eigen.converged.all()]
        if missed:
            notes.append(f"The largest eigenvalue did not reach the tolerance in: {', '.join(missed)}.")
        value, stderr = _value_and_stderr(self.trace)
        asked = self.options.precision
        if value is not None and asked is not None and not stderr <= asked * abs(value):
            share = f"{stderr / abs(value):.2g}" if value else "infinity"
            notes.append(f"The standard error of the trace is {share} of it; {asked:g} was asked for.")
        linear = self.linear_density
        if value is not None and linear is not None:
            spread = math.hypot(stderr, linear.trace_stderr)
            apart = abs(value - linear.trace)
            if apart > 4 * spread:
                notes.append(
                    f"The trace ({value:.4g}) and the one that the density implies ({linear.trace:.4g}) are "
                    f"{apart / spread if spread else math.inf:.1f} standard errors apart: trust neither."
                )
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        value, stderr = _value_and_stderr(self.trace)
        result: dict[str, Any] = {
            "operator": self.options.operator,
            "examples": self.examples,
            "parameters": self.parameters,
            "interrupted": self.interrupted,
            "notes": self.notes,
            "top_eigenvalues": [] if self.eigen is None else self.eigen.values.tolist(),
            "residuals": [] if self.eigen is None else self.eigen.residuals.tolist(),
            "relative_residuals": self.relative_residuals,
            "converged": [] if self.eigen is None else self.eigen.converged.tolist(),
            "status": [] if self.eigen is None else self.eigen.status,
            "products": 0 if self.eigen is None else self.eigen.products,
            "trace": value,
            "trace_stderr": None if value is None else stderr,
            "trace_probes": 0 if self.trace is None else self.trace.products,
            # That of the result may be another: of an interrupted "hutch++" only Hutchinson's part may be there.
            "trace_method": getattr(self.trace, "method", None if self.trace is None else self.options.trace),
            "trace_samples": self.trace.samples.tolist() if isinstance(self.trace, TraceResult) else None,
            "layers": None if self.layers is None else [layer.as_dict() for layer in self.layers],
            "density": None if self.density is None else _curve(self.density),
            "landscape": None if self.landscape is None else _surface(self.landscape),
            "stages": [vars(stage) for stage in self.stages],
            "seconds": self.seconds,
        }
        return result


def _curve(found: DensityResult | LogDensityResult) -> dict[str, Any]:
    linear = found.linear if isinstance(found, LogDensityResult) else found
    result: dict[str, Any] = {
        "grid": linear.grid.tolist(),
        "values": linear.values.tolist(),
        "sigma": linear.sigma,
        "trace": linear.trace,
        "trace_stderr": linear.trace_stderr,
        "squared_frobenius": linear.squared_frobenius,
        "squared_frobenius_stderr": linear.squared_frobenius_stderr,
        "products": linear.products,
        "log": None,
    }
    if isinstance(found, LogDensityResult):
        names = ("sigma", "threshold", "positive_mass", "negative_mass", "zero_mass", "uncertain_mass")
        result["log"] = {name: getattr(found, name) for name in names}
        result["log"] |= {name: getattr(found, name).tolist() for name in ("grid", "positive", "negative")}
    return result


def _surface(found: LandscapeResult) -> dict[str, Any]:
    def plain(values: Mapping[str, Tensor] | None) -> dict[str, Any] | None:
        return None if values is None else {name: value.tolist() for name, value in values.items()}

    return {
        "coordinates": [axis.tolist() for axis in found.coordinates],
        "labels": list(found.labels),
        "losses": plain(found.losses),
        "centre": dict(found.centre),
        "slopes": plain(found.slopes),
        "curvatures": plain(found.curvatures),
        "evaluations": found.evaluations,
        "interrupted": found.interrupted,
    }


def _value_and_stderr(found: TraceResult | BlockTraceResult | None) -> tuple[float | None, float]:
    if found is None:
        return None, math.nan
    return (found.trace, found.trace_stderr) if isinstance(found, BlockTraceResult) else (found.value, found.stderr)
