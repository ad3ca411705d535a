"""The spectrum of a trained network, as `kronfac spectrum` and `kronfac demo` report it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from kronfac import operators
from kronfac.cli.errors import RunError, UsageError, one_line
from kronfac.cli.problems import Problem, blame, count_examples, fixed_batches
from kronfac.operators import CurvatureOperator
from kronfac.spectrum import (
    BlockTraceResult,
    DensityResult,
    EigenResult,
    TraceResult,
    block_traces,
    density,
    eigsh,
    trace,
)
from kronfac.spectrum._interrupt import interruptible

Report = Callable[[str, int, int | None], None]
"""Called as report(stage, products done in it, products in all or None)."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class SpectrumOptions:
    """What to compute.

    Attributes:
        operator: "hessian", "ggn" or "fisher".
        fisher: "mc", "exact" or "empirical".
        top: eigenvalues of largest magnitude.
        tol: tolerance of their residuals relative to the largest.
        multiplicity: search for further copies of repeated eigenvalues, which costs about as much again.
        trace: "hutchinson", "hutch++", "xtrace", or None for no trace.
        trace_probes: products to spend on it; with `precision` the most to spend, None for 10,000.
        precision: the standard error to reach, as a share of the trace.
        layers: trace, Frobenius norm and largest eigenvalue of every layer's block.
        density: whether to estimate the spectral density.
        density_probes: its probes.
        density_steps: Lanczos steps per probe.
        double: compute the eigenvalues in float64. Where a network is nearly certain of every example, the Hessian of
            the cross-entropy is made of differences 1 - p, of which float32 knows a few digits only.
        seed: of all random vectors.
    """

    operator: str = "hessian"
    fisher: str = "mc"
    top: int = 10
    tol: float = 1e-4
    multiplicity: bool = True
    trace: str | None = "hutchinson"
    trace_probes: int | None = 100
    precision: float | None = None
    layers: bool = False
    density: bool = True
    density_probes: int = 10
    density_steps: int = 80
    double: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One part of the analysis.

    Attributes:
        name: what was computed.
        status: "done", "partial" (ended by Ctrl-C, with a result) or "left out" (ended or not begun, without one).
        products: products with single vectors that it took.
        seconds: that it took.
    """

    name: str
    status: str
    products: int
    seconds: float


@dataclass(frozen=True)
class Layer:
    """The diagonal block of one layer.

    Attributes:
        name: of the module or group.
        traces: trace and squared Frobenius norm of the layer's rows, or None.
        eigen: the eigenpair of largest magnitude of its block, or None.
    """

    name: str
    traces: BlockTraceResult | None
    eigen: EigenResult | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        result: dict[str, Any] = {"name": self.name}
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
        stages: what was done, in order.
        seconds: of all computations.
    """

    options: SpectrumOptions
    examples: int
    parameters: int
    eigen: EigenResult | None
    trace: TraceResult | BlockTraceResult | None
    layers: list[Layer] | None
    density: DensityResult | None
    stages: list[Stage]
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it before all was computed."""
        return any(stage.status != "done" for stage in self.stages)

    @property
    def relative_residuals(self) -> list[float]:
        """Residuals ‖Hv - λv‖ over the largest |λ|."""
        if self.eigen is None:
            return []
        scale = float(self.eigen.values.abs().max())
        return [residual / scale if scale > 0 else residual for residual in self.eigen.residuals.tolist()]

    @property
    def notes(self) -> list[str]:
        """What a reader has to know before relying on the figures."""
        notes = []
        if self.interrupted:
            states = [f"{stage.name} {stage.status}" for stage in self.stages if stage.status != "done"]
            notes.append(f"Interrupted: {', '.join(states)}. The figures below are of what had been computed.")
        if self.eigen is not None and not self.eigen.converged.all():
            count = int((~self.eigen.converged).sum())
            notes.append(f"{count} of {len(self.eigen.converged)} eigenpairs did not reach the tolerance.")
        missed = [layer.name for layer in self.layers or [] if layer.eigen and not layer.eigen.converged.all()]
        if missed:
            notes.append(f"The largest eigenvalue did not reach the tolerance in: {', '.join(missed)}.")
        value, stderr = _value_and_stderr(self.trace)
        asked = self.options.precision
        if value is not None and asked is not None and not stderr <= asked * abs(value):
            share = f"{stderr / abs(value):.2g}" if value else "infinity"
            notes.append(f"The standard error of the trace is {share} of it; {asked:g} was asked for.")
        if value is not None and self.density is not None:
            spread = math.hypot(stderr, self.density.trace_stderr)
            apart = abs(value - self.density.trace)
            if apart > 4 * spread:
                notes.append(
                    f"The trace ({value:.4g}) and the one that the density implies ({self.density.trace:.4g}) are "
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
            "products": 0 if self.eigen is None else self.eigen.products,
            "trace": value,
            "trace_stderr": None if value is None else stderr,
            "trace_probes": 0 if self.trace is None else self.trace.products,
            "trace_method": None if self.trace is None else self.options.trace,
            "trace_samples": self.trace.samples.tolist() if isinstance(self.trace, TraceResult) else None,
            "layers": None if self.layers is None else [layer.as_dict() for layer in self.layers],
            "density": None,
            "stages": [vars(stage) for stage in self.stages],
            "seconds": self.seconds,
        }
        if self.density is not None:
            result["density"] = {
                "grid": self.density.grid.tolist(),
                "values": self.density.values.tolist(),
                "sigma": self.density.sigma,
                "trace": self.density.trace,
                "trace_stderr": self.density.trace_stderr,
                "squared_frobenius": self.density.squared_frobenius,
                "squared_frobenius_stderr": self.density.squared_frobenius_stderr,
                "products": self.density.products,
            }
        return result


def analyse(
    problem: Problem,
    options: SpectrumOptions,
    examples: int | None = None,
    report: Report = lambda stage, done, total: None,
) -> Spectrum:
    """Compute eigenvalues, trace, layers and density of a problem's training loss.

    The first Ctrl-C ends it with what has been computed, the second one at once with what earlier stages have.

    Args:
        problem: the model, left as it is, and its data.
        options: what to compute.
        examples: use the first so many training examples; all by default.
        report: progress.

    Raises:
        UsageError: the options do not fit the model.
        RunError: the curvature is not finite, as after a diverged training.
        KeyboardInterrupt: Ctrl-C before there was anything to return.
    """
    batches = fixed_batches(problem, examples)
    stages = _Stages(report)
    start = time.perf_counter()
    was_training = problem.model.training
    problem.model.eval()  # dropout and batch statistics would make another function of every product
    try:
        found = _compute(problem, options, batches, stages)
    except (UsageError, RunError):
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(f"{options.operator} of {problem.name}: {one_line(error)}") from error
    except Exception as error:  # of the user's model or loss
        raise RunError(blame(f"{options.operator} of {problem.name}", error)) from error
    finally:
        problem.model.train(was_training)
    return Spectrum(
        options=options,
        examples=sum(count_examples(targets) for _, targets in batches),
        stages=stages.finished,
        seconds=time.perf_counter() - start,
        **found,
    )


def _compute(
    problem: Problem, options: SpectrumOptions, batches: list[tuple[Any, Any]], stages: _Stages
) -> dict[str, Any]:
    """The fields of the Spectrum that are results."""
    with interruptible() as stop:
        stages.asked = lambda: stop.requested
        op = _operator(problem, problem.model, batches, options)
        size = op.shape[0]
        if options.top > size:
            raise UsageError(f"--top: expected at most {size}, the number of parameters, got {options.top}")
        precise = _operator(problem, *_doubled(problem.model, batches), options) if options.double else op
        if options.operator == "fisher":
            op = precise  # in another precision other targets would be drawn, and the figures be of two matrices
        seed, groups = options.seed, _groups(op, problem)
        eigen = stages.run(
            "eigenvalues",
            lambda progress: eigsh(
                precise, options.top, tol=options.tol, multiplicity=options.multiplicity, seed=seed, progress=progress
            ),
        )
        # Hutchinson's probes serve the whole matrix and all its blocks at once.
        shared = options.layers and options.trace == "hutchinson" and options.precision is None
        found_trace: TraceResult | BlockTraceResult | None = None
        if options.trace is not None and not shared:
            method = options.trace
            found_trace = stages.run(
                "trace", lambda progress: trace(op, method, **_effort(options), seed=seed, progress=progress)
            )
        layers = None
        if options.layers:
            probes = (options.trace_probes or 100) if shared else 100
            blocks = stages.run(
                "trace by layer",
                lambda progress: block_traces(
                    op, groups | {_WHOLE: op.names}, probes=probes, seed=seed, progress=progress
                ),
            )
            if shared and blocks is not None:
                found_trace = blocks[_WHOLE]
            tops = stages.run(
                "eigenvalue by layer",
                lambda progress: _tops(precise, groups, options, progress, stages.stop),
                products=lambda found: sum(each.products for each in found.values()),
                partial=lambda found: len(found) < len(groups),
            )
            layers = _joined(groups, blocks or {}, tops or {})
        found_density = None
        if options.density:
            found_density = stages.run(
                "density",
                lambda progress: density(
                    op, probes=options.density_probes, steps=options.density_steps, seed=seed, progress=progress
                ),
            )
        if not any((eigen, found_trace, layers, found_density)):
            raise KeyboardInterrupt
    return {
        "parameters": size,
        "eigen": eigen,
        "trace": found_trace,
        "layers": layers,
        "density": found_density,
    }


Progress = Callable[[int, int | None], None]

_WHOLE = "\0"  # no module or group has this name


@dataclass
class _Stages:
    """Runs the stages one after the other, until Ctrl-C, and keeps account."""

    report: Report
    asked: Callable[[], bool] = lambda: False
    finished: list[Stage] = field(default_factory=list)
    _ended: bool = False

    def stop(self) -> bool:
        """Whether Ctrl-C has come."""
        return self._ended or self.asked()

    def run(
        self,
        name: str,
        work: Callable[[Progress], Result],
        *,
        products: Callable[[Result], int] = lambda found: _products(found),
        partial: Callable[[Result], bool] = lambda found: _interrupted(found),
    ) -> Result | None:
        """The result of the work, or None where Ctrl-C came before or left nothing of it."""
        start = time.perf_counter()
        found = None
        if not self.stop():
            try:
                found = work(lambda done, total: self.report(name, done, total))
            except KeyboardInterrupt:
                self._ended = True
        status = "left out" if found is None else "partial" if partial(found) else "done"
        spent = 0 if found is None else products(found)
        self.finished.append(Stage(name, status, spent, time.perf_counter() - start))
        return found


def _products(found: Any) -> int:
    """Of a result, or of results by name that share them."""
    first = next(iter(found.values())) if isinstance(found, dict) else found
    return int(first.products)


def _interrupted(found: Any) -> bool:
    first = next(iter(found.values())) if isinstance(found, dict) else found
    return bool(getattr(first, "interrupted", False))


def _operator(
    problem: Problem, model: nn.Module, batches: list[tuple[Any, Any]], options: SpectrumOptions
) -> CurvatureOperator:
    if options.operator == "fisher":
        if problem.likelihood is None:
            raise UsageError(
                f"--operator fisher: of what is {problem.name}'s loss the negative logarithm? Say so with --likelihood"
            )
        return operators.fisher(
            model,
            problem.likelihood,
            batches,
            kind=options.fisher,
            seed=options.seed,
            batch_size=problem.batch_size,
        )
    build = {"hessian": operators.hessian, "ggn": operators.ggn}[options.operator]
    return build(model, problem.loss_fn, batches, batch_size=problem.batch_size)


def _effort(options: SpectrumOptions) -> dict[str, Any]:
    """How many products the trace may take."""
    if options.precision is None:
        return {"probes": options.trace_probes}
    limit = {} if options.trace_probes is None else {"max_products": options.trace_probes}
    return {"target_relative": options.precision, **limit}


def _groups(op: CurvatureOperator, problem: Problem) -> dict[str, list[str]]:
    """Parameter names by layer; a module that is the model itself goes by the name of its class."""
    blocks = op.blocks(problem.groups)
    return {name or type(problem.model).__name__: list(block.names) for name, block in blocks.items()}


def _tops(
    op: CurvatureOperator,
    groups: Mapping[str, Iterable[str]],
    options: SpectrumOptions,
    progress: Progress,
    stop: Callable[[], bool],
) -> dict[str, EigenResult]:
    found: dict[str, EigenResult] = {}
    spent = 0
    for name, block in op.blocks(groups).items():
        if stop():
            break
        before = spent

        def report(done: int, total: int | None, before: int = before) -> None:
            progress(before + done, None)

        try:
            found[name] = eigsh(block, 1, tol=options.tol, multiplicity=False, seed=options.seed, progress=report)
        except KeyboardInterrupt:
            break
        spent += found[name].products
    return found


def _joined(
    groups: Iterable[str], traces: Mapping[str, BlockTraceResult], tops: Mapping[str, EigenResult]
) -> list[Layer] | None:
    layers = [Layer(name, traces.get(name), tops.get(name)) for name in groups if name in traces or name in tops]
    return sorted(layers, key=_size, reverse=True) or None


def _size(layer: Layer) -> float:
    if layer.traces is not None:
        return abs(layer.traces.trace)
    return 0.0 if layer.eigen is None else float(layer.eigen.values[0].abs())


def _value_and_stderr(found: TraceResult | BlockTraceResult | None) -> tuple[float | None, float]:
    if found is None:
        return None, math.nan
    return (found.trace, found.trace_stderr) if isinstance(found, BlockTraceResult) else (found.value, found.stderr)


def _doubled(model: nn.Module, batches: list[tuple[Any, Any]]) -> tuple[nn.Module, list[tuple[Any, Any]]]:
    """Copies of model and data in float64."""
    return copy.deepcopy(model).double(), [(_double(inputs), _double(targets)) for inputs, targets in batches]


def _double(value: Any) -> Any:
    """Floating-point tensors in float64, also inside lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_double(item) for item in value)
    return value
