"""`kronfac spectrum`: eigenvalues, trace and density of a network's Hessian or GGN."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kronfac.cli.errors import UsageError
from kronfac.cli.options import DataDir, Device, Json, OperatorName, ProblemArgument, Quiet, was_given


def spectrum(
    context: typer.Context,
    problem: ProblemArgument = "digits",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Parameters: a checkpoint of `kronfac train` or a saved state dict. Without it, fresh ones."),
    ] = None,
    operator: Annotated[OperatorName, typer.Option(help="Hessian or generalised Gauss-Newton.")] = OperatorName.HESSIAN,
    top: Annotated[int, typer.Option(min=1, help="Eigenvalues of largest magnitude.")] = 10,
    tol: Annotated[float, typer.Option(help="Tolerance of their residuals, relative to the largest.")] = 1e-4,
    trace_probes: Annotated[int, typer.Option(help="Random probes for the trace; 0 for no trace.")] = 100,
    density: Annotated[bool, typer.Option("--density/--no-density", help="Estimate the spectral density.")] = True,
    density_probes: Annotated[int, typer.Option(min=2, help="Random probes for the density.")] = 10,
    density_steps: Annotated[int, typer.Option(min=1, help="Lanczos steps per probe.")] = 80,
    double: Annotated[
        bool, typer.Option("--double", help="Eigenvalues in float64: for losses too small for float32 to resolve.")
    ] = False,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples to use (default: all).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of fresh parameters and of the random vectors.")] = 0,
    data_dir: DataDir = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Directory for spectrum.json and plots.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute leading eigenvalues with residuals, trace with standard error, and spectral density."""
    from kronfac.cli.analysis import SpectrumOptions, analyse
    from kronfac.cli.checkpoint import load_parameters, read_parameters
    from kronfac.cli.output import StagedProgress, make_directory, to_json, write_atomically
    from kronfac.cli.problems import load_problem

    if trace_probes < 0 or trace_probes == 1:
        raise UsageError(f"--trace-probes: expected 0 or at least 2, got {trace_probes}")
    if not 0 < tol < 1:
        raise UsageError(f"--tol: expected a number between 0 and 1, got {tol}")
    state = None
    if checkpoint is not None:
        state, config = read_parameters(checkpoint)
        trained = None if config is None else str(config.get("problem"))
        if trained is not None and not was_given(context, "problem"):
            problem = trained
        if trained is not None and problem != trained:
            raise UsageError(f"{checkpoint}: was trained on {trained}, not on {problem}")
    subject = load_problem(problem, data_dir=data_dir, seed=seed, device=device)
    if checkpoint is not None and state is not None:
        load_parameters(subject.model, state, checkpoint)
    if out is not None:
        make_directory(out)
    options = SpectrumOptions(
        operator=operator.value,
        top=top,
        tol=tol,
        trace_probes=trace_probes,
        density=density,
        density_probes=density_probes,
        density_steps=density_steps,
        double=double,
        seed=seed,
    )
    with StagedProgress(unit="product", quiet=quiet) as progress:
        found = analyse(subject, options, examples, progress.report)
    result: dict[str, Any] = {
        "problem": subject.name,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "device": device,
        "seed": seed,
        **found.as_dict(),
    }
    if out is not None:
        from kronfac.cli.report.figures import result_figure

        write_atomically(out / "eigenvalues.png", result_figure(found.eigen))
        if found.trace is not None:
            write_atomically(out / "trace.png", result_figure(found.trace))
        if found.density is not None:
            write_atomically(out / "density.png", result_figure(found.density))
        write_atomically(out / "spectrum.json", to_json(result) + "\n")
    typer.echo(to_json(result) if as_json else _summary(result, out))


def _summary(result: dict[str, Any], out: Path | None) -> str:
    lines = [
        f"{result['operator']} of {result['problem']}: {result['parameters']:,} parameters, "
        f"{result['examples']:,} examples, {result['seconds']:.1f} s",
        "rank   eigenvalue   residual",
    ]
    rows = zip(result["top_eigenvalues"], result["residuals"], result["converged"], strict=True)
    for rank, (value, residual, converged) in enumerate(rows, start=1):
        lines.append(f"{rank:4d}  {value:11.5g}  {residual:9.2g}{'' if converged else '  not converged'}")
    if result["trace"] is not None:
        lines.append(f"trace {result['trace']:.5g} ± {result['trace_stderr']:.2g} ({result['trace_probes']} probes)")
    if out is not None:
        lines.append(f"written to {out}")
    return "\n".join(lines)
