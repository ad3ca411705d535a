"""What the records say: the tables, the share of eigenvalue computations, and which published directions are seen."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.clock import disturbance
from bench.large_batch.settings import ADAPTIVE, TITLES, Plan

HELD = 0.01
"""A method holds where its accuracy is at most this much below that of the baseline at the base batch."""


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        method: a key of `TITLES`.
        batch: B.
        seed: of weights and order.
        updates: steps of the optimizer.
        accuracy: on the test split.
        fgsm: accuracy after FGSM; None where the run diverged.
        pgd: accuracy after PGD, likewise.
        eigenvalue: top Hessian eigenvalue at the end; None where it did not converge.
        diverged: the loss ended as NaN or infinite.
        seconds: of training, the eigenvalue computations included.
        eigen_seconds: of these.
        disturbed: why its times say little, or None.
        log: rows of the schedule.
        facts: of the machine and the software.
    """

    method: str
    batch: int
    seed: int
    updates: int
    accuracy: float
    fgsm: float | None
    pgd: float | None
    eigenvalue: float | None
    diverged: bool
    seconds: float
    eigen_seconds: float
    disturbed: str | None
    log: list[dict[str, Any]]
    facts: dict[str, Any]

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        """From the contents of a record's file."""
        return Record(
            data["method"],
            data["batch"],
            data["seed"],
            data["updates"],
            data["accuracy"],
            data["fgsm"],
            data["pgd"],
            data["eigenvalue"],
            data["status"] == "diverged",
            data["seconds"],
            data["eigen_seconds"],
            disturbance(data["seconds"], data["cpu_seconds"], data["waited_seconds"], data["threads"]),
            data["log"],
            data["machine"] | {"threads": data["threads"]},
        )


def read(results: Path, plan: Plan) -> list[Record]:
    """The finished runs of a plan, by file name. What was killed half way has no record."""
    records = [
        Record.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(results.glob(f"{plan.key}-*.json"))
    ]
    batches = {plan.base_batch, *plan.batches}
    return [record for record in records if record.batch in batches and record.seed in plan.seeds]


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one batch size.

    Attributes:
        records: one per seed.
    """

    records: tuple[Record, ...]

    def values(self, name: str) -> list[float]:
        """A quantity of all runs that have it."""
        found = (getattr(record, name) for record in self.records)
        return [float(value) for value in found if value is not None]

    def mean(self, name: str) -> float | None:
        """Its mean over the seeds; None where a run does not have it."""
        values = self.values(name)
        return statistics.fmean(values) if values and len(values) == len(self.records) else None

    def show(self, name: str, scale: float, digits: int) -> str:
        """Mean ± standard deviation over the seeds, of those that have it."""
        values = [scale * value for value in self.values(name)]
        if not values:
            return "-"
        text = f"{statistics.fmean(values):.{digits}f}"
        return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text

    @property
    def diverged(self) -> int:
        """How many of the runs."""
        return sum(record.diverged for record in self.records)


def cells(records: Iterable[Record]) -> dict[tuple[str, int], Cell]:
    """The runs by method and batch."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda one: one.seed):
        found.setdefault((record.method, record.batch), []).append(record)
    return {key: Cell(tuple(runs)) for key, runs in found.items()}


@dataclass(frozen=True)
class Finding:
    """A published direction.

    Attributes:
        text: what is published.
        seen: whether the means of these runs say so; None where runs are missing.
        figures: on which the answer rests.
    """

    text: str
    seen: bool | None
    figures: str


def findings(records: Sequence[Record], plan: Plan) -> list[Finding]:
    """Which of the published directions the means over the seeds show."""
    table = cells(records)
    sizes = sorted(plan.batches)

    def line(method: str, name: str) -> list[float] | None:
        found = [table[method, size].mean(name) if (method, size) in table else None for size in sizes]
        return [value for value in found if value is not None] if None not in found else None

    def judge(text: str, methods: Sequence[str], name: str, rule: Callable[..., bool], digits: int = 1) -> Finding:
        rows = [line(method, name) for method in methods]
        scale = 1.0 if name in ("updates", "eigenvalue") else 100.0
        shown = [
            f"{TITLES[method]} " + ", ".join(f"{scale * value:.{digits}f}" for value in row)
            for method, row in zip(methods, rows, strict=True)
            if row is not None
        ]
        return Finding(text, None if None in rows else rule(*rows), "; ".join(shown))

    base = table.get(("bl", plan.base_batch))
    top = base.mean("accuracy") if base is not None else None

    def holds(row: Sequence[float]) -> bool:
        return top is not None and all(value >= top - HELD for value in row)

    result = [
        judge(
            "BL falls with the batch size",
            ["bl"],
            "accuracy",
            lambda bl: all(later < sooner for sooner, later in itertools.pairwise(bl)),
        ),
        judge(
            "FB falls later than BL (it is better at the second batch size)",
            ["bl", "fb"],
            "accuracy",
            lambda bl, fb: fb[min(1, len(fb) - 1)] > bl[min(1, len(bl) - 1)],
        ),
        judge("FB falls further than BL (at the largest)", ["bl", "fb"], "accuracy", lambda bl, fb: fb[-1] < bl[-1]),
    ]
    for method in ("gg", *ADAPTIVE):
        text = f"{TITLES[method]} holds (within {100 * HELD:g} points of BL at {plan.base_batch})"
        found = judge(text, [method], "accuracy", holds, 2)
        result.append(found if top is not None else Finding(text, None, found.figures))
    for method in ADAPTIVE:
        result.append(
            judge(
                f"{TITLES[method]} needs fewer updates than GG",
                [method, "gg"],
                "updates",
                lambda few, many: all(a < b for a, b in zip(few, many, strict=True)),
                0,
            )
        )
    result.append(
        judge(
            "ABSA ends at a smaller top eigenvalue than ABS (at every batch size)",
            ["abs", "absa"],
            "eigenvalue",
            lambda plain, robust: all(b < a for a, b in zip(plain, robust, strict=True)),
            2,
        )
    )
    result.append(
        judge(
            "ABSA ends at a better FGSM accuracy than ABS (at every batch size)",
            ["abs", "absa"],
            "fgsm",
            lambda plain, robust: all(b > a for a, b in zip(plain, robust, strict=True)),
        )
    )
    return result


def eigen_share(records: Iterable[Record]) -> float | None:
    """Seconds in eigenvalue computations over all seconds of training; None without runs."""
    runs = list(records)
    total = sum(record.seconds for record in runs)
    return sum(record.eigen_seconds for record in runs) / total if total > 0 else None


def markdown(records: Sequence[Record], plan: Plan) -> str:
    """The report.

    Raises:
        ValueError: there is no finished run of the plan.
    """
    if not records:
        raise ValueError("there is no finished run of this plan yet; `run` makes them")
    table = cells(records)
    wanted = len(plan.seeds) * (1 + len(plan.batches) * len(TITLES))
    parts = [
        f"{len(records)} of {wanted} runs: {plan.examples:,} training examples of MNIST, {plan.epochs} epochs, "
        f"{len(plan.seeds)} seeds; mean ± standard deviation over the seeds."
    ]
    base = table.get(("bl", plan.base_batch))
    if base is not None:
        parts.append(
            f"BL at {plan.base_batch}: {base.show('accuracy', 100, 2)} % / {base.show('updates', 1, 0)} updates, top "
            f"eigenvalue {base.show('eigenvalue', 1, 2)}, FGSM {base.show('fgsm', 100, 1)} %."
        )
    parts.append("Accuracy in % / updates\n\n" + _table(table, plan, _accuracy))
    parts.append("Top Hessian eigenvalue at the end\n\n" + _table(table, plan, lambda c: c.show("eigenvalue", 1, 2)))
    parts.append(
        f"Accuracy in % after FGSM, ε = {plan.eps:g} of pixels in [0, 1]\n\n"
        + _table(table, plan, lambda c: c.show("fgsm", 100, 1))
    )
    parts.append(
        f"Accuracy in % after PGD of 10 steps, same ε, first {plan.pgd_examples:,} test examples\n\n"
        + _table(table, plan, lambda c: c.show("pgd", 100, 1))
    )
    parts.append("Published directions\n\n" + _findings(findings(records, plan)))
    parts.append(_times(records))
    machines = {
        f"{r.facts['cpu']}, {r.facts['instruction_set']} kernels, {r.facts['threads']} thread(s) a run, torch "
        f"{r.facts['torch']}, kronfac {r.facts['kronfac']}"
        for r in records
    }
    return "\n\n".join([*parts, *sorted(machines)]) + "\n"


def _accuracy(cell: Cell) -> str:
    text = f"{cell.show('accuracy', 100, 2)} / {statistics.fmean(cell.values('updates')):.0f}"
    return text + (f" ({cell.diverged} diverged)" if cell.diverged else "")


def _table(table: dict[tuple[str, int], Cell], plan: Plan, show: Callable[[Cell], str]) -> str:
    rows = [f"| B | {' | '.join(TITLES.values())} |", "|---" * (1 + len(TITLES)) + "|"]
    for size in plan.batches:
        found = [table.get((method, size)) for method in TITLES]
        rows.append(f"| {size} | {' | '.join('-' if cell is None else show(cell) for cell in found)} |")
    return "\n".join(rows)


def _findings(found: Sequence[Finding]) -> str:
    rows = ["| published | here | means over the seeds, by batch size |", "|---|---|---|"]
    words = {True: "yes", False: "no", None: "runs are missing"}
    rows += [f"| {one.text} | {words[one.seen]} | {one.figures} |" for one in found]
    return "\n".join(rows)


def _times(records: Sequence[Record]) -> str:
    lines = []
    share = eigen_share(records)
    if share is not None:
        lines.append(f"* eigenvalue computations: {100 * share:.1f} % of the training time of all runs")
    for method in ADAPTIVE:
        runs = [record for record in records if record.method == method]
        share = eigen_share(runs)
        if share is not None:
            most = max(record.eigen_seconds / record.seconds for record in runs)
            lines.append(f"* {TITLES[method]}: {100 * share:.1f} % of their time, {100 * most:.1f} % in the worst run")
    longest = max(record.seconds for record in records)
    total = sum(record.seconds for record in records)
    lines.append(f"* training: {total / 60:.0f} minutes in all, {longest:.0f} s the longest run")
    disturbed = [record for record in records if record.disturbed]
    if disturbed:
        lines.append(f"* the times of {len(disturbed)} runs were disturbed by other work on the machine")
    return "Time\n\n" + "\n".join(lines)
