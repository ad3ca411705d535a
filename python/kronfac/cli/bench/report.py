"""Reports as JSON and as tables, and the comparison of two."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kronfac.cli.bench.peak import Peak
from kronfac.cli.errors import UsageError

SCHEMA = 1
_ENTRY = ("op", "case", "threads", "correct", "rate", "unit", "ratio", "rival", "sides")


def document(
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    peaks: Sequence[Peak],
    results: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A whole report as plain data."""
    return {
        "schema": SCHEMA,
        "machine": dict(machine),
        "settings": dict(settings),
        "peaks": [vars(peak) for peak in peaks],
        "results": [dict(result) for result in results],
        "steps": [dict(step) for step in steps],
    }


def load(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        UsageError: no such file, or not a report of this schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--compare {path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UsageError(f"--compare {path}: not JSON; expected a file written by `kronfac bench --json`") from None
    problem = _problem(content)
    if problem:
        raise UsageError(f"--compare {path}: {problem}; expected a file written by `kronfac bench --json`")
    assert isinstance(content, dict)
    return content


def _problem(content: Any) -> str | None:
    if not isinstance(content, dict) or "schema" not in content:
        return "no report"
    if content["schema"] != SCHEMA:
        return f"schema {content['schema']!r}, this version reads {SCHEMA}"
    results = content.get("results")
    if not isinstance(results, list) or not isinstance(content.get("machine"), dict):
        return "results or machine are missing"
    for result in results:
        missing = [name for name in _ENTRY if not isinstance(result, dict) or name not in result]
        if missing:
            return f"a result without {missing[0]!r}"
    return None


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def peak_line(peak: Peak) -> str:
    """One line about one measured peak."""
    return (
        f"peak {peak.isa}, {peak.threads} thread(s): {peak.float32 / 1e9:.0f} GFLOP/s float32, "
        f"{peak.float64 / 1e9:.0f} float64, copy {peak.copy / 1e9:.1f} GB/s, read {peak.read / 1e9:.1f} GB/s"
    )


def mebibytes(side: Mapping[str, Any]) -> str:
    """By how much the first call of a side raised the resident memory."""
    extra = side.get("peak_memory")
    return "-" if extra is None else f"{extra / (1 << 20):.1f} MiB"


COLUMNS = ("operator", "case", "thr", "time", "rate", "peak", "ratio", "quartiles", "error", "memory", "rivals")
_WIDTHS = (18, 26, 3, 9, 14, 5, 6, 13, 8, 9)


def header() -> str:
    """The titles over the lines of `result_line`."""
    return _columns(COLUMNS)


def result_line(result: Mapping[str, Any]) -> str:
    """One line about one case: our time, rate, share of the peak, the rival's time over ours, errors."""
    sides = result["sides"]
    unit = "GB/s" if result["unit"] == "byte" else "GFLOP/s"
    fraction = result["fraction_of_peak"]
    low, high = result["ratio_quartiles"]
    rivals = ", ".join(
        f"{name} {seconds(side['median'])} ({side['ratio']:.2f}x, {side['error']:.0e}, {mebibytes(side)})"
        for name, side in sides.items()
        if name != "kronfac"
    )
    return _columns(
        (
            result["op"],
            result["case"],
            str(result["threads"]),
            seconds(sides["kronfac"]["median"]),
            f"{result['rate'] / 1e9:.3g} {unit}",
            "-" if fraction is None else f"{fraction:.0%}",
            f"{result['ratio']:.2f}x",
            f"{low:.2f}-{high:.2f}",
            f"{sides['kronfac']['error']:.0e}" + ("" if result["correct"] else " WRONG"),
            mebibytes(sides["kronfac"]),
            rivals,
        )
    )


def _columns(cells: Sequence[str]) -> str:
    return "  ".join(
        [f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=False)] + list(cells[len(_WIDTHS) :])
    )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What changed between two reports, case by case.

    Returns:
        Per case that both have: `speedup`, the old time over the new; `relative`, the new ratio to the rival over the
        old one, which is what travels between machines and busy minutes; and the two ratios.
    """
    before = {_key(result): result for result in old["results"]}
    changes = []
    for result in new["results"]:
        match = before.get(_key(result))
        if match is None:
            continue
        changes.append(
            {
                "op": result["op"],
                "case": result["case"],
                "threads": result["threads"],
                "speedup": match["sides"]["kronfac"]["median"] / result["sides"]["kronfac"]["median"],
                "relative": result["ratio"] / match["ratio"],
                "ratios": [match["ratio"], result["ratio"]],
                "correct": bool(match["correct"] and result["correct"]),
            }
        )
    return changes


def comparison_lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`compare` as a table, with a warning where the machines differ."""
    lines = []
    for name in ("cpu", "instruction_set", "torch"):
        a, b = old["machine"].get(name), new["machine"].get(name)
        if a != b:
            lines.append(f"warning: {name} differs ({a} then, {b} now): read the ratios to the rival, not the times")
    changes = compare(old, new)
    if not changes:
        return [*lines, "nothing to compare: the reports have no case in common"]
    lines.append(f"{'operator':<18}  {'case':<26}  thr  old/new time  ratio to rival: then, now, now/then")
    for change in changes:
        then, now = change["ratios"]
        lines.append(
            f"{change['op']:<18}  {change['case']:<26}  {change['threads']:<3}  {change['speedup']:>11.2f}x  "
            f"{then:.2f}x, {now:.2f}x, {change['relative']:.2f}x" + ("" if change["correct"] else "  WRONG")
        )
    return lines


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result["op"], result["case"], result["threads"]
