"""`kronfac bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kronfac.cli.errors import RunError, UsageError
from kronfac.cli.output import to_json, write_atomically


def bench(
    op: Annotated[list[str] | None, typer.Option("--op", help="Only this operator; may be repeated.")] = None,
    threads: Annotated[str, typer.Option("--threads", help="Numbers of threads, separated by commas.")] = "1,2",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cases, few rounds: checks the harness, measures nothing.")
    ] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Samples per side; medians of fewer than 7 are weak.")
    ] = 7,
    steps: Annotated[bool, typer.Option("--steps", help="Whole K-FAC steps against SGD instead of operators.")] = False,
    network: Annotated[
        list[str] | None, typer.Option("--network", help="With --steps: only this network; may be repeated.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="With --steps: where the time goes, by operator.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Also print what changed since this earlier report.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the cases and stop.")] = False,
) -> None:
    """Time the operators, or whole steps, against what you would use instead; both sides by turns in this process."""
    from kronfac import _host
    from kronfac.cli.bench import cases, machine, report
    from kronfac.cli.bench.operators import Settings, run_case
    from kronfac.cli.bench.peak import measure_peak

    counts = _thread_counts(threads)
    _check_combination(steps, op, network, profile, compare)
    try:
        chosen = cases.select(op or (), quick=quick)
    except ValueError as error:
        raise UsageError(f"--op: {error}") from None
    if list_cases:
        for case in chosen:
            typer.echo(case.key)
        return
    if not chosen:
        raise UsageError("--op: no quick cases of these operators; leave out --quick")
    workloads = _workloads(network) if steps else []
    old = None if compare is None else report.load(compare)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UsageError(f"--json {json_file}: no such directory; create it first")
    settings = Settings(rounds=min(rounds, 3), sample_seconds=1e-3) if quick else Settings(rounds=rounds)

    facts = machine.describe()
    typer.echo(
        f"{facts['cpu']}; kernels {facts['instruction_set']}; torch {facts['torch']}; load {facts['load_average'][0]}"
    )
    peaks, results, step_entries = [], [], []
    for count in counts:
        if steps:
            step_entries += _run_steps(workloads, count, rounds, quick, profile)
            continue
        size = {"seconds": 0.01, "rounds": 2, "array_bytes": 16 << 20} if quick else {}
        peak = measure_peak(_host.instruction_set(), count, **size)  # type: ignore[arg-type]
        peaks.append(peak)
        typer.echo(report.peak_line(peak))
        typer.echo(report.header())
        for case in chosen:
            results.append(run_case(case, count, settings, peak))
            typer.echo(report.result_line(results[-1]))
    content = report.document(facts, asdict(settings) | {"quick": quick}, peaks, results, step_entries)
    if json_file is not None:
        write_atomically(json_file, to_json(content))
    if old is not None:
        for line in report.comparison_lines(old, content):
            typer.echo(line)
    wrong = [f"{result['op']}[{result['case']}]" for result in results if not result["correct"]]
    if wrong:
        raise RunError(f"wrong results, whose times mean nothing: {', '.join(dict.fromkeys(wrong))}")


def _run_steps(workloads: list[Any], count: int, rounds: int, quick: bool, profile: bool) -> list[dict[str, Any]]:
    from kronfac.cli.bench.steps import SCHEDULES, Schedule, run_steps, step_lines

    entries = []
    for workload in workloads:
        for schedule in [Schedule(1, 4)] if quick else SCHEDULES:
            entry = run_steps(
                workload,
                schedule,
                count,
                periods=1 if quick else rounds,
                batch=max(2, workload.batch // 16) if quick else None,
                profile=profile,
            )
            entries.append(entry)
            for line in step_lines(entry):
                typer.echo(line)
    return entries


def _thread_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"--threads: expected numbers >= 1 separated by commas, got {text!r}")
    return list(dict.fromkeys(counts))


def _check_combination(
    steps: bool, op: list[str] | None, network: list[str] | None, profile: bool, compare: Path | None
) -> None:
    if steps and op:
        raise UsageError("--op: not together with --steps, which measures whole steps; leave out one")
    if steps and compare is not None:
        raise UsageError("--compare: not together with --steps; it compares operators")
    if not steps and (network or profile):
        raise UsageError(f"{'--network' if network else '--profile'}: only together with --steps")


def _workloads(names: list[str] | None) -> list[Any]:
    from kronfac.cli.bench.steps import WORKLOADS

    for name in names or ():
        if name not in WORKLOADS:
            raise UsageError(f"--network: unknown network {name!r}; expected one of {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in names or WORKLOADS]
