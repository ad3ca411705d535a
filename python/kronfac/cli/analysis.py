"""The spectrum of a trained network, as `kronfac spectrum` and `kronfac demo` report it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kronfac.cli.errors import RunError, UsageError, one_line
from kronfac.cli.problems import LossFunction, Problem, count_examples, fixed_batches
from kronfac.spectrum import DensityResult, EigenResult, TraceResult, density, eigsh, trace

Report = Callable[[str, int, int | None], None]
"""Called as report(stage, products done in it, products in all or None)."""


@dataclass(frozen=True)
class SpectrumOptions:
    """What to compute.

    Attributes:
        operator: "hessian" or "ggn".
        top: eigenvalues of largest magnitude.
        tol: tolerance of their residuals relative to the largest.
        multiplicity: search for further copies of repeated eigenvalues, which costs about as much again.
        trace_probes: Hutchinson probes, or 0 for no trace.
        density: whether to estimate the spectral density.
        density_probes: its probes.
        density_steps: Lanczos steps per probe.
        double: compute the eigenvalues in float64. Where a network is nearly certain of every example, the Hessian of
            the cross-entropy is made of differences 1 - p, of which float32 knows a few digits only.
        seed: of all random vectors.
    """

    operator: str = "hessian"
    top: int = 10
    tol: float = 1e-4
    multiplicity: bool = True
    trace_probes: int = 100
    density: bool = True
    density_probes: int = 10
    density_steps: int = 80
    double: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Spectrum:
    """Results with their errors.

    Attributes:
        options: what was asked for.
        examples: examples that the curvature is averaged over.
        parameters: size of the matrix.
        eigen: leading eigenpairs.
        trace: or None.
        density: or None.
        seconds: of all computations.
    """

    options: SpectrumOptions
    examples: int
    parameters: int
    eigen: EigenResult
    trace: TraceResult | None
    density: DensityResult | None
    seconds: float

    @property
    def relative_residuals(self) -> list[float]:
        """Residuals ‖Hv - λv‖ over the largest |λ|."""
        scale = float(self.eigen.values.abs().max())
        return [residual / scale if scale > 0 else residual for residual in self.eigen.residuals.tolist()]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        result: dict[str, Any] = {
            "operator": self.options.operator,
            "examples": self.examples,
            "parameters": self.parameters,
            "top_eigenvalues": self.eigen.values.tolist(),
            "residuals": self.eigen.residuals.tolist(),
            "relative_residuals": self.relative_residuals,
            "converged": self.eigen.converged.tolist(),
            "products": self.eigen.products,
            "trace": None if self.trace is None else self.trace.value,
            "trace_stderr": None if self.trace is None else self.trace.stderr,
            "trace_probes": 0 if self.trace is None else self.trace.products,
            "density": None,
            "seconds": self.seconds,
        }
        if self.density is not None:
            result["density"] = {
                "grid": self.density.grid.tolist(),
                "values": self.density.values.tolist(),
                "sigma": self.density.sigma,
                "products": self.density.products,
            }
        return result


def analyse(
    problem: Problem,
    options: SpectrumOptions,
    examples: int | None = None,
    report: Report = lambda stage, done, total: None,
) -> Spectrum:
    """Compute the leading eigenvalues, the trace and the density of a problem's training loss.

    Args:
        problem: the model, left as it is, and its data.
        options: what to compute.
        examples: use the first so many training examples; all by default.
        report: progress.

    Raises:
        UsageError: the options do not fit the model.
        RunError: the curvature is not finite, as after a diverged training.
    """
    from kronfac import operators

    batches = fixed_batches(problem, examples)
    start = time.perf_counter()
    was_training = problem.model.training
    problem.model.eval()  # dropout and batch statistics would make another function of every product
    try:
        build = {"hessian": operators.hessian, "ggn": operators.ggn}[options.operator]
        op = build(problem.model, problem.loss_fn, batches)
        size = op.shape[0]
        if options.top > size:
            raise UsageError(f"--top: expected at most {size}, the number of parameters, got {options.top}")
        precise = build(*_doubled(problem, batches)) if options.double else op
        eigen = eigsh(
            precise,
            options.top,
            tol=options.tol,
            multiplicity=options.multiplicity,
            seed=options.seed,
            progress=_stage(report, "eigenvalues"),
        )
        found_trace = found_density = None
        if options.trace_probes:
            found_trace = trace(op, probes=options.trace_probes, seed=options.seed, progress=_stage(report, "trace"))
        if options.density:
            found_density = density(
                op,
                probes=options.density_probes,
                steps=options.density_steps,
                seed=options.seed,
                progress=_stage(report, "density"),
            )
    except (ValueError, RuntimeError) as error:
        raise RunError(f"{options.operator} of {problem.name}: {one_line(error)}") from error
    finally:
        problem.model.train(was_training)
    return Spectrum(
        options=options,
        examples=sum(count_examples(targets) for _, targets in batches),
        parameters=size,
        eigen=eigen,
        trace=found_trace,
        density=found_density,
        seconds=time.perf_counter() - start,
    )


def _doubled(problem: Problem, batches: list[tuple[Any, Any]]) -> tuple[nn.Module, LossFunction, list[tuple[Any, Any]]]:
    """Copies of model and data in float64, and the loss."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    doubled = [(double(inputs), double(targets)) for inputs, targets in batches]
    return copy.deepcopy(problem.model).double(), problem.loss_fn, doubled


def _stage(report: Report, name: str) -> Callable[[int, int | None], None]:
    return lambda done, total: report(name, done, total)
