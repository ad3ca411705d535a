"""The spectrum of a trained network, as `kronfac spectrum` and `kronfac demo` report it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from kronfac import operators
from kronfac.cli.analysed import Layer as Layer
from kronfac.cli.analysed import Spectrum as Spectrum
from kronfac.cli.analysed import SpectrumOptions as SpectrumOptions
from kronfac.cli.analysed import Stage as Stage
from kronfac.cli.errors import RunError, UsageError, one_line
from kronfac.cli.problems import Problem, blame, count_examples, fixed_batches, fixed_test_batches, known_likelihood
from kronfac.operators import CurvatureOperator
from kronfac.spectrum import (
    BlockTraceResult,
    DensityResult,
    EigenResult,
    LandscapeResult,
    LogDensityResult,
    TraceResult,
    block_traces,
    density,
    eigsh,
    landscape,
    trace,
)
from kronfac.spectrum._interrupt import interruptible

Report = Callable[[str, int, int | None], None]
"""Called as report(stage, products done in it, products in all or None)."""

Result = TypeVar("Result")


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

    A part that fails is recorded as such, and the others are computed all the same.

    Raises:
        UsageError: the options do not fit the model.
        RunError: the curvature is not finite, as after a diverged training, or all parts have failed.
        KeyboardInterrupt: Ctrl-C before there was anything to return.
    """
    batches = fixed_batches(problem, examples)
    # Read now: bad test data should not come to light when all else has been computed.
    test = fixed_test_batches(problem, options.landscape_test) if options.landscape else None
    stages = _Stages(report)
    start = time.perf_counter()
    try:
        found = _compute(problem, options, batches, test, stages)
    except (UsageError, RunError):
        raise
    except Exception as error:
        raise RunError(f"{options.operator} of {problem.name}: {_reason(error)}") from error
    return Spectrum(
        options=options,
        examples=sum(count_examples(targets) for _, targets in batches),
        stages=stages.finished,
        seconds=time.perf_counter() - start,
        **found,
    )


def _compute(
    problem: Problem,
    options: SpectrumOptions,
    batches: list[tuple[Any, Any]],
    test: list[tuple[Any, Any]] | None,
    stages: _Stages,
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
        seed, kinds = options.seed, _groups(op, problem)
        groups = {name: names for name, (_, names) in kinds.items()}
        eigen = stages.run(
            "eigenvalues",
            lambda progress: eigsh(
                precise,
                options.top,
                options.which,
                tol=options.tol,
                multiplicity=options.multiplicity,
                seed=seed,
                progress=progress,
            ),
        )
        # Hutchinson's probes serve the whole matrix and all its blocks at once.
        shared = options.layers and options.trace == "hutchinson"
        found_trace: TraceResult | BlockTraceResult | None = None
        if options.trace is not None and not shared:
            method = options.trace
            found_trace = stages.run(
                "trace", lambda progress: trace(op, method, **_effort(options), seed=seed, progress=progress)
            )
        layers = None
        if options.layers:
            effort = _effort(options) if shared or options.precision is not None else {"probes": 100}
            blocks = stages.run(
                "trace by layer",
                lambda progress: block_traces(op, groups | {_WHOLE: op.names}, **effort, seed=seed, progress=progress),
            )
            if shared and blocks is not None:
                found_trace = blocks[_WHOLE]
            tops = stages.run(
                "eigenvalue by layer",
                lambda progress: _tops(precise, groups, options, progress, stages.stop),
                products=lambda found: sum(each.products for each in found.values()),
                partial=lambda found: len(found) < len(groups) or any(map(_interrupted, found.values())),
            )
            layers = [
                Layer(name, kind, (blocks or {}).get(name), (tops or {}).get(name))
                for name, (kind, _) in kinds.items()
                if name in (blocks or {}) or name in (tops or {})
            ]
            layers = sorted(layers, key=_size, reverse=True) or None
        found_density = None
        if options.density is not None:
            found_density = stages.run("density", lambda progress: _density(op, options, progress))
        surface = None
        if options.landscape:
            surface = stages.run(
                "landscape", lambda progress: _landscape(problem, op, batches, test, eigen, options, progress)
            )
        if not any((eigen, found_trace, layers, found_density, surface)):
            failed = next((stage.error for stage in stages.finished if stage.error is not None), None)
            if failed is None:
                raise KeyboardInterrupt
            raise RunError(f"{options.operator} of {problem.name}: {failed}")
    return {
        "parameters": size,
        "eigen": eigen,
        "trace": found_trace,
        "layers": layers,
        "density": found_density,
        "landscape": surface,
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
        found = error = None
        if not self.stop():
            try:
                found = work(lambda done, total: self.report(name, done, total))
            except KeyboardInterrupt:
                self._ended = True
            except Exception as caught:  # what other stages have found is not lost
                error = _reason(caught)
        status = "left out" if found is None else "partial" if partial(found) else "done"
        spent = 0 if found is None else products(found)
        seconds = time.perf_counter() - start
        self.finished.append(Stage(name, "failed" if error else status, spent, seconds, error))
        return found


def _products(found: Any) -> int:
    """Of a result, or of results by name that share them."""
    first = next(iter(found.values())) if isinstance(found, dict) else found
    return int(first.products)


def _interrupted(found: Any) -> bool:
    first = next(iter(found.values())) if isinstance(found, dict) else found
    return bool(getattr(first, "interrupted", False))


def _reason(error: Exception) -> str:
    """Of kronfac's errors the message; of others, which come from the user's model or loss, where as well."""
    return one_line(error) if isinstance(error, ValueError | TypeError | RuntimeError) else blame("failed", error)


def _operator(
    problem: Problem, model: nn.Module, batches: list[tuple[Any, Any]], options: SpectrumOptions
) -> CurvatureOperator:
    if options.operator == "fisher":
        return operators.fisher(
            model,
            known_likelihood(problem),
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


def _groups(op: CurvatureOperator, problem: Problem) -> dict[str, tuple[str | None, list[str]]]:
    """Kind and parameter names by layer; parameters of the model itself go by the name of its class."""
    if problem.groups is not None:
        return {name: (None, list(block.names)) for name, block in op.blocks(problem.groups).items()}
    found: dict[str, tuple[str | None, list[str]]] = {}
    blocks = op.blocks()
    for name, block in blocks.items():
        kind = type(problem.model.get_submodule(name)).__name__
        root = kind if kind not in blocks else f"({kind})"
        found[name or root] = (kind, list(block.names))
    return found


def _density(op: CurvatureOperator, options: SpectrumOptions, progress: Progress) -> DensityResult | LogDensityResult:
    probes, steps, seed = options.density_probes, options.density_steps, options.seed
    if options.density == "log":
        return density(op, axis="log", probes=probes, steps=steps, seed=seed, progress=progress)
    return density(op, probes=probes, steps=steps, seed=seed, progress=progress)


def _landscape(
    problem: Problem,
    op: CurvatureOperator,
    batches: list[tuple[Any, Any]],
    test: list[tuple[Any, Any]] | None,
    eigen: EigenResult | None,
    options: SpectrumOptions,
    progress: Progress,
) -> LandscapeResult:
    """The loss along the first eigenvectors, on the training and the test data."""
    if eigen is None or len(eigen.values) < options.landscape:
        raise ValueError("the eigenvectors that it is along have not been found")
    data = {"training": batches}
    if test is not None:
        data["test"] = test
    values = eigen.values[: options.landscape].tolist()
    return landscape(
        problem.model,
        problem.loss_fn,
        data,
        list(eigen.vectors[:, : options.landscape].to(op.dtype).mT),
        radius=options.landscape_radius,
        points=options.landscape_points,
        labels=[f"along eigenvector {rank} (λ = {value:.4g})" for rank, value in enumerate(values, start=1)],
        batch_size=problem.batch_size,
        curvature=True,
        progress=progress,
    )


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


def _size(layer: Layer) -> float:
    if layer.traces is not None:
        return abs(layer.traces.trace)
    return 0.0 if layer.eigen is None else float(layer.eigen.values[0].abs())


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
