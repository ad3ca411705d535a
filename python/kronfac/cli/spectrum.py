"""`kronfac spectrum`: eigenvalues, traces and density of a network's Hessian, GGN or Fisher matrix, as a report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronfac.cli.errors import RunError, UsageError
from kronfac.cli.options import (
    DataDir,
    DensityAxis,
    Device,
    Fisher,
    Json,
    Landscape,
    LikelihoodName,
    OperatorName,
    ProblemArgument,
    Quiet,
    TraceMethod,
    Which,
    was_given,
)

if TYPE_CHECKING:
    from kronfac.cli.problems import Problem

_JSON = "spectrum.json"
_PAGE = "report.html"


def spectrum(
    context: typer.Context,
    problem: ProblemArgument = "digits",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Parameters: a checkpoint of `kronfac train` or a saved state dict. Without it, fresh ones."),
    ] = None,
    operator: Annotated[OperatorName, typer.Option(help="Hessian, generalised Gauss-Newton or Fisher matrix.")] = (
        OperatorName.HESSIAN
    ),
    fisher: Annotated[Fisher, typer.Option(help="Fisher matrix: drawn targets, the expectation, or the data's.")] = (
        Fisher.MC
    ),
    likelihood: Annotated[
        LikelihoodName | None, typer.Option(help="Fisher matrix: what the loss is the negative log of.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many eigenvalues.")] = 10,
    which: Annotated[Which, typer.Option(help="Those of largest magnitude, the largest, or half from each end.")] = (
        Which.MAGNITUDE
    ),
    tol: Annotated[float, typer.Option(help="Tolerance of their residuals, relative to the largest.")] = 1e-4,
    layers: Annotated[
        bool, typer.Option("--layers", help="Trace, Frobenius norm and largest eigenvalue of every layer.")
    ] = False,
    trace: Annotated[TraceMethod, typer.Option(help="How to estimate the trace.")] = TraceMethod.HUTCHINSON,
    trace_probes: Annotated[
        int, typer.Option(help="Products for the trace, with --precision the most (default then 10,000); 0 for none.")
    ] = 100,
    precision: Annotated[
        float | None,
        typer.Option(
            help="Go on until the standard error of the trace (with --layers: all) is at most this share (0.02: 2 %)."
        ),
    ] = None,
    density: Annotated[
        DensityAxis, typer.Option(help="Spectral density over λ; log: also over the decades of |λ|, signs apart.")
    ] = DensityAxis.LINEAR,
    no_density: Annotated[bool, typer.Option("--no-density", help="The same as --density none.")] = False,
    density_probes: Annotated[int, typer.Option(min=2, help="Random probes for the density.")] = 10,
    density_steps: Annotated[int, typer.Option(min=1, help="Lanczos steps per probe.")] = 80,
    landscape: Annotated[Landscape, typer.Option(help="The loss along the first eigenvectors.")] = Landscape.NONE,
    radius: Annotated[float, typer.Option(help="Landscape: how far to go, a distance of parameters.")] = 1.0,
    points: Annotated[
        int | None, typer.Option(min=2, help="Landscape: points along each direction (default: 51, in 2d 21).")
    ] = None,
    double: Annotated[
        bool, typer.Option("--double", help="Eigenvalues in float64: for losses too small for float32 to resolve.")
    ] = False,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples to use (default: all).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of fresh parameters and of the random vectors.")] = 0,
    data_dir: DataDir = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help=f"Directory for {_PAGE}, {_JSON} and the figures.")] = Path(
        "spectrum-report"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look at a Hessian: leading eigenvalues with residuals, traces with standard errors, layers, spectral density.

    Ctrl-C writes the report of what has been computed so far, marked as partial, and exits with status 1; a second one
    gives up what is being computed at once.
    """
    from kronfac.cli.analysis import SpectrumOptions, analyse
    from kronfac.cli.output import StagedProgress, make_directory, plain, to_json
    from kronfac.cli.problems import fixed_batches, known_likelihood

    given = {name for name in context.params if was_given(context, name)}
    method = None if trace is TraceMethod.NONE or trace_probes == 0 else trace.value
    _check(method, tol, trace_probes, precision, given)
    if operator is not OperatorName.FISHER and (wrong := [name for name in ("fisher", "likelihood") if name in given]):
        raise UsageError(f"--{wrong[0]} applies to --operator fisher only")
    if no_density and "density" in given and density is not DensityAxis.NONE:
        raise UsageError(f"--no-density contradicts --density {density.value}; leave one of both out")
    directions = {Landscape.NONE: 0, Landscape.LINE: 1, Landscape.PLANE: 2}[landscape]
    if directions > top:
        raise UsageError(f"--landscape {landscape.value}: needs --top {directions} or more, got {top}")
    if not 0 < radius < float("inf"):
        raise UsageError(f"--radius: expected a finite number greater than 0, got {radius}")
    subject = _subject(problem, checkpoint, given, data_dir=data_dir, seed=seed, device=device)
    if likelihood is not None:
        if ":" in subject.name and subject.likelihood is not None:
            raise UsageError(f"--likelihood: {subject.name} says itself what its likelihood is; leave the option out")
        subject = replace(subject, likelihood=likelihood.value)
    if operator is OperatorName.FISHER:
        known_likelihood(subject)
    if "top" not in given:
        top = min(top, subject.parameters)
    if top > subject.parameters:
        raise UsageError(f"--top: expected at most {subject.parameters}, the number of parameters, got {top}")
    # Read before anything is written: bad data leave no directory behind.
    subject = replace(subject, ordered=fixed_batches(subject, examples))
    make_directory(out)
    options = SpectrumOptions(
        operator=operator.value,
        fisher=fisher.value,
        top=top,
        which=which.value,
        tol=tol,
        layers=layers,
        trace=method,
        trace_probes=None if precision is not None and "trace_probes" not in given else trace_probes,
        precision=precision,
        density=None if no_density or density is DensityAxis.NONE else density.value,
        density_probes=density_probes,
        density_steps=density_steps,
        landscape=directions,
        landscape_points=points,
        landscape_radius=radius,
        landscape_test=examples,
        double=double,
        seed=seed,
    )
    with StagedProgress(unit="product", quiet=quiet) as progress:
        found = analyse(subject, options, report=progress.report)
    result: dict[str, Any] = plain(
        {
            "format": "kronfac spectrum",
            "version": 1,
            "problem": subject.name,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "device": device,
            "seed": seed,
            "which": which.value,
            "tol": tol,
            "precision": precision,
            "double": double,
            **found.as_dict(),
            "settings": _settings(options, subject, device),
            "environment": _environment(),
            "command": shlex.join(["kronfac", *sys.argv[1:]]),
            "report": str(out / _PAGE),
        }
    )
    _write(out, result)
    typer.echo(to_json(result) if as_json else _summary(result))
    if found.failures:
        raise RunError(f"{operator.value} of {subject.name}: {found.failures[0]}; {out / _PAGE} holds the rest")
    if found.interrupted:
        raise RunError(f"interrupted; {out / _PAGE} holds what had been computed")


def _check(method: str | None, tol: float, trace_probes: int, precision: float | None, given: set[str]) -> None:
    least = {"hutch++": 6, "xtrace": 4}.get(method or "", 2)
    if method is not None and trace_probes < least:
        raise UsageError(f"--trace-probes: expected 0 or at least {least}, got {trace_probes}")
    if trace_probes < 0:
        raise UsageError(f"--trace-probes: expected 0 or at least 2, got {trace_probes}")
    if not 0 < tol < 1:
        raise UsageError(f"--tol: expected a number between 0 and 1, got {tol}")
    if precision is None:
        return
    if not 0 < precision < 1:
        raise UsageError(f"--precision: expected a share of the trace between 0 and 1, got {precision}")
    if method is None:
        raise UsageError("--precision is that of the trace, which is not to be computed; leave one of both out")
    if method == "hutch++":
        raise UsageError("--precision: hutch++ fixes its number of products beforehand; use --trace xtrace")
    if "trace_probes" in given and trace_probes < 16:
        raise UsageError(f"--trace-probes: expected at least 16 with --precision, got {trace_probes}")


def _subject(
    problem: str, checkpoint: Path | None, given: set[str], *, data_dir: Path | None, seed: int, device: str
) -> Problem:
    """The problem, at the parameters of the checkpoint."""
    from kronfac.cli.checkpoint import load_parameters, read_parameters
    from kronfac.cli.problems import load_problem

    state = None
    if checkpoint is not None:
        state, config = read_parameters(checkpoint)
        trained = None if config is None else str(config.get("problem"))
        if trained is not None and "problem" not in given:
            problem = trained
        if trained is not None and problem != trained:
            raise UsageError(f"{checkpoint}: was trained on {trained}, not on {problem}")
    subject = load_problem(problem, data_dir=data_dir, seed=seed, device=device)
    if checkpoint is not None and state is not None:
        load_parameters(subject.model, state, checkpoint)
    return subject


def _settings(options: Any, subject: Problem, device: str) -> dict[str, Any]:
    """What decides the figures, as the page shows it."""
    settings: dict[str, Any] = {"operator": options.operator}
    own = {str(p.dtype).removeprefix("torch.") for p in subject.model.parameters() if p.requires_grad}
    dtype = "float64" if options.double else ", ".join(sorted(own))
    if options.operator == "fisher":
        settings |= {"kind": options.fisher, "likelihood": str(subject.likelihood)}
    settings |= {
        "model": type(subject.model).__name__,
        "eigenvalues": f"{options.top} by {options.which}, tolerance {options.tol:g}, in {dtype}",
    }
    if options.trace is not None:
        effort = f"{options.trace_probes or 10_000:,} products"
        if options.precision is not None:
            effort = f"standard error at most {options.precision:g} of it, at most {effort}"
        settings["trace"] = f"{options.trace}, {effort}"
    if options.density is not None:
        settings["density"] = f"{options.density_probes} probes, {options.density_steps} Lanczos steps each"
    if options.landscape:
        settings["landscape"] = f"{options.landscape} of the eigenvectors, radius {options.landscape_radius:g}"
    return settings | {"seed": options.seed, "device": device}


def _environment() -> dict[str, Any]:
    from kronfac.cli import info

    known = info.collect()
    names = ("kronfac", "torch", "numpy", "python", "platform", "cpu", "instruction_set", "threads")
    return {name: known[name] for name in names}


def _write(out: Path, result: dict[str, Any]) -> None:
    """The page last: where it is there, so is the rest."""
    from kronfac.cli.output import to_json, write_atomically
    from kronfac.cli.report import spectrum_figures, spectrum_page
    from kronfac.cli.report.theme import DARK, LIGHT

    light, dark = spectrum_figures.draw_all(result, LIGHT), spectrum_figures.draw_all(result, DARK)
    if (out / _JSON).exists():  # an earlier report, of which a figure that this one lacks would be left
        for name in spectrum_figures.NAMES:
            (out / f"{name}.png").unlink(missing_ok=True)
    for name, png in light.items():
        write_atomically(out / f"{name}.png", png)
    write_atomically(out / _JSON, to_json(result) + "\n")
    write_atomically(out / _PAGE, spectrum_page.render(result, light, dark))


def _summary(result: dict[str, Any]) -> str:
    lines = [
        f"{result['operator']} of {result['problem']}: {result['parameters']:,} parameters, "
        f"{result['examples']:,} examples, {result['seconds']:.1f} s"
    ]
    if result["top_eigenvalues"]:
        lines.append("rank   eigenvalue   residual")
    rows = zip(result["top_eigenvalues"], result["residuals"], result["status"], strict=True)
    for rank, (value, residual, status) in enumerate(rows, start=1):
        flag = "" if status == "converged" else f"  not converged ({status})"
        lines.append(f"{rank:4d}  {value:11.5g}  {residual:9.2g}{flag}")
    if result["trace"] is not None:
        lines.append(
            f"trace {result['trace']:.5g} ± {result['trace_stderr']:.2g} "
            f"({result['trace_method']}, {result['trace_probes']} products)"
        )
    if result["layers"]:
        lines += _layer_lines(result["layers"])
    lines += [f"note: {note}" for note in result["notes"]]
    lines.append(f"report: {result['report']}")
    return "\n".join(lines)


def _layer_lines(layers: list[dict[str, Any]]) -> list[str]:
    width = min(40, max(5, *(len(layer["name"]) for layer in layers)))
    lines = [f"{'layer':{width}}  parameters        trace   ± stderr  mean eigenvalue  largest eigenvalue"]
    for layer in layers:
        cells = [f"{layer['name'][-width:]:{width}}", f"{layer['parameters']:10,d}"]
        keys = (("trace", 11), ("trace_stderr", 9), ("mean_eigenvalue", 15), ("top_eigenvalue", 18))
        for key, size in keys:
            cells.append(f"{layer[key]:{size}.4g}" if key in layer else f"{'-':>{size}}")
        lines.append("  ".join(cells))
    return lines
