"""What the records say: final errors, and when each method reached the best final error of the first-order methods."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.autoencoder.settings import FIRST_ORDER, TITLES, Setting
from bench.clock import disturbance

GRID, FINAL = "grid", "final"


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        step: steps made before it.
        seconds: of training before it.
        error: of the network or of the averaged one, whichever is lower.
    """

    step: int
    seconds: float
    error: float


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        setting: what was run.
        stage: "grid" or "final".
        minutes: its time.
        curve: its evaluations in order; whatever is not finite is left out.
        steps: made in all.
        seconds: of training in all.
        diverged: the loss ended as NaN or infinite.
        disturbed: why its times say little, or None.
        facts: of the machine and the software.
    """

    setting: Setting
    stage: str
    minutes: float
    curve: tuple[Point, ...]
    steps: int
    seconds: float
    diverged: bool
    disturbed: str | None
    facts: dict[str, Any]

    @property
    def final_error(self) -> float:
        """The error of the last evaluation; infinite for a run that diverged."""
        return math.inf if self.diverged or not self.curve else self.curve[-1].error

    def reached(self, target: float) -> Point | None:
        """The first evaluation at or below a target, without interpolation between evaluations."""
        return next((point for point in self.curve if point.error <= target), None)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        """From the contents of a record's file."""
        curve = []
        for entry in data["curve"]:
            errors = [entry[name] for name in ("raw", "averaged") if entry[name] is not None]
            if errors:  # what was not finite is null in the file
                curve.append(Point(entry["step"], entry["seconds"], min(errors)))
        return Record(
            Setting.from_json(data["setting"]),
            data["stage"],
            data["minutes"],
            tuple(curve),
            data["steps"],
            data["seconds"],
            data["status"] == "diverged",
            _disturbed(data),
            data["machine"] | {"threads": data["threads"]},
        )


LEAST_FILLED = 0.8
"""A run that ends with less of its time used was planned while the machine was busy."""


def _disturbed(data: dict[str, Any]) -> str | None:
    reasons = [disturbance(data["seconds"], data["cpu_seconds"], data["waited_seconds"], data["threads"])]
    if data["cut_short"]:
        reasons.append(f"its time was over after {data['steps']} of {data['planned_steps']} planned steps")
    elif data["status"] == "finished" and data["seconds"] < LEAST_FILLED * 60 * data["minutes"]:
        reasons.append(f"its plan filled {data['seconds']:.0f} s of {60 * data['minutes']:.0f} s")
    return "; ".join(reason for reason in reasons if reason is not None) or None


def read(results: Path, stage: str, minutes: float) -> list[Record]:
    """The finished runs of one stage and length, by file name. What was killed half way has no record."""
    records = [
        Record.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(results.glob(f"{stage}-{minutes:g}min-*.json"))
    ]
    return [record for record in records if record.stage == stage and record.minutes == minutes]


def best(records: Iterable[Record], count: int = 1) -> list[Record]:
    """The records of lowest final error, those that diverged left out."""
    alive = [record for record in records if math.isfinite(record.final_error)]
    return sorted(alive, key=lambda record: record.final_error)[:count]


@dataclass(frozen=True)
class Line:
    """A method in the table.

    Attributes:
        method: a key of `TITLES`.
        tuning_runs: settings that were tried.
        best: its final run of lowest final error, None without one.
        reached: where that run reached the target, None if it did not.
        earliest: among all its runs, tuning runs included, the one whose clock was lowest where it reached the target,
            and where that was. A tuning run's schedule ends earlier.
    """

    method: str
    tuning_runs: int
    best: Record | None
    reached: Point | None
    earliest: tuple[Record, Point] | None


@dataclass(frozen=True)
class Summary:
    """The race in figures.

    Attributes:
        champion: the final run of the first-order methods with the lowest final error; None without one.
        mark: where the champion reached that error itself: what the ratios are taken to.
        lines: one per method with any run.
    """

    champion: Record | None
    mark: Point | None
    lines: tuple[Line, ...]


def summarise(tuning: Sequence[Record], final: Sequence[Record]) -> Summary:
    """Compare the methods."""
    champions = best(record for record in final if record.setting.method in FIRST_ORDER)
    champion = champions[0] if champions else None
    mark = champion.reached(champion.final_error) if champion is not None else None
    lines = []
    for method in TITLES:
        tried = [record for record in tuning if record.setting.method == method]
        ran = [record for record in final if record.setting.method == method]
        if not tried and not ran:
            continue
        leading = best(ran)
        reached, earliest = None, None
        if mark is not None:
            reached = leading[0].reached(mark.error) if leading else None
            crossings = [(record, point) for record in (*ran, *tried) if (point := record.reached(mark.error))]
            earliest = min(crossings, key=lambda crossing: crossing[1].seconds, default=None)
        lines.append(Line(method, len(tried), leading[0] if leading else None, reached, earliest))
    return Summary(champion, mark, tuple(lines))


def markdown(tuning: Sequence[Record], final: Sequence[Record]) -> str:
    """The report: a table, what the machine was, and every tuning run."""
    summary = summarise(tuning, final)
    parts = []
    if summary.mark is None or summary.champion is None:
        parts.append("There is no finished final run of a first-order method yet, so there is nothing to reach.")
    else:
        parts.append(
            f"The error to reach is {_figures(summary.mark.error)}, the lowest final error of the first-order methods "
            f"({TITLES[summary.champion.setting.method]}), reached after {summary.mark.seconds:.0f} s and "
            f"{summary.mark.step:,} steps. Ratios are to these two."
        )
    rows = [
        "| method | tuning runs | best setting | final error | steps | seconds | seconds to reach it | ratio "
        "| steps to reach it | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in summary.lines:
        cells = [TITLES[line.method], str(line.tuning_runs)]
        if line.best is None:
            cells += ["no final run"] + ["-"] * 7
        else:
            mark = " (disturbed)" if line.best.disturbed else ""
            cells += [
                line.best.setting.describe() + mark,
                _figures(line.best.final_error),
                f"{line.best.steps:,}",
                f"{line.best.seconds:.0f}",
                *_crossing(line.reached, summary.mark),
            ]
        rows.append(f"| {' | '.join(cells)} |")
    parts.append("\n".join(rows))
    earliest = [
        f"* {TITLES[line.method]}: {point.seconds:.0f} s and {point.step:,} steps, in a {record.stage} run of "
        f"{record.minutes:g} minutes ({record.setting.describe()}); ratios {point.seconds / summary.mark.seconds:.2f} "
        f"and {point.step / summary.mark.step:.3f}."
        for line in summary.lines
        if line.earliest is not None and summary.mark is not None and line.method not in FIRST_ORDER
        for record, point in [line.earliest]
    ]
    if earliest:
        parts.append(
            "Earliest of all runs, the tuning runs and their shorter schedules included:\n\n" + "\n".join(earliest)
        )
    disturbed = [record for record in (*tuning, *final) if record.disturbed]
    if disturbed:
        parts.append(
            "Disturbed after all retries:\n\n"
            + "\n".join(f"* {r.stage} {r.setting.key} ({r.setting.describe()}): {r.disturbed}" for r in disturbed)
        )
    if tuning:
        parts.append("Tuning runs:\n\n" + _tuning_table(tuning))
    machines = {
        f"{r.facts['cpu']}, {r.facts['instruction_set']} kernels, {r.facts['threads']} threads, torch "
        f"{r.facts['torch']}, kronfac {r.facts['kronfac']}"
        for r in (*tuning, *final)
    }
    parts += sorted(machines)
    return "\n\n".join(parts) + "\n"


def _tuning_table(tuning: Sequence[Record]) -> str:
    rows = ["| method | setting | steps | final error |", "|---|---|---|---|"]
    for method, title in TITLES.items():
        for record in tuning:
            if record.setting.method == method:
                error = "diverged" if record.diverged else _figures(record.final_error)
                rows.append(f"| {title} | {record.setting.describe()} | {record.steps:,} | {error} |")
    return "\n".join(rows)


def _crossing(reached: Point | None, mark: Point | None) -> list[str]:
    if mark is None:
        return ["-"] * 4
    if reached is None:
        return ["not reached", "-", "not reached", "-"]
    return [
        f"{reached.seconds:.0f}",
        f"{reached.seconds / mark.seconds:.2f}",
        f"{reached.step:,}",
        f"{reached.step / mark.step:.3f}",
    ]


def _figures(error: float) -> str:
    return f"{error:.3g}" if math.isfinite(error) else "diverged"
