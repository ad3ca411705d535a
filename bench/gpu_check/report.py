"""Records of parts become one document and one table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu_check.files import read_json, write, write_json

PARTS = ("build", "operators", "kfac", "sanitizer", "bench")
SCHEMA = 1
SAME = ("device", "driver", "torch", "nvcc", "sources")
"""Facts that records must have in common to be one result."""


def plain(value: Any) -> Any:
    """Copy nested containers with what JSON has no number for (infinity, NaN) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


def read_records(state: Path, out: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Records about this device, software and source, by part, and why others are left out.

    Those of the folder `state` come first; then those of earlier documents in `out`, because a machine that is lent for
    minutes may have run only some parts.
    """
    records: dict[str, Any] = {}
    left_out = []
    for part in PARTS:
        record = read_json(state / f"{part}.json")
        if not isinstance(record, dict) or record.get("part") != part:
            continue
        other = _other(record.get("facts", {}), facts)
        if other is None:
            records[part] = record
        else:
            left_out.append(f"{part}: the record is of another {other} and left out; run that part again")
    for path in sorted(out.glob("*.json"), reverse=True):
        content = read_json(path)
        if isinstance(content, dict) and content.get("schema") == SCHEMA and _other(content["facts"], facts) is None:
            for part, record in content["parts"].items():
                records.setdefault(part, record)
    return records, left_out


def _other(found: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """The first fact that differs, with both values."""
    for name in SAME:
        if found.get(name) != facts[name]:
            return f"{name} ({found.get(name)}, not {facts[name]})"
    return None


def document(facts: Mapping[str, Any], records: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept; `finished` is when the last part was."""
    return {
        "schema": SCHEMA,
        "finished": max((record["finished"] for record in records.values()), default=None),
        "facts": dict(facts),
        "parts": {
            part: {name: value for name, value in records[part].items() if name not in ("facts", "part")}
            for part in PARTS
            if part in records
        },
    }


def save(folder: Path, content: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write the table and the document, named by device and day."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(content["facts"]["device"]).lower()).strip("-")
    day = (content["finished"] or "nothing")[:10]
    table, whole = (folder / f"{slug}-{day}.{suffix}" for suffix in ("md", "json"))
    write_json(whole, content)
    write(table, markdown(content))
    return table, whole


def results(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measured cases of all operators."""
    found: list[dict[str, Any]] = content["parts"].get("bench", {}).get("found", {}).get("results", [])
    return found


def steps(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measured comparisons of whole steps."""
    found: list[dict[str, Any]] = content["parts"].get("bench", {}).get("found", {}).get("steps", [])
    return found


def missed_bars(content: Mapping[str, Any]) -> list[str]:
    """Cases that are right and slower than what they should be."""
    missed = [
        f"{case['op']}[{case['case']}]: {case['ratio']:.2f}x, bar {case['bar']:.2f}x"
        for case in results(content)
        if case["bar"] is not None and case["ratio"] < case["bar"]
    ]
    return missed + [
        f"KFAC step [{entry['case']}]: {entry['ratio']:.3f}x SGD, bar {entry['bar']:.2f}x"
        for entry in steps(content)
        if entry["ratio"] > entry["bar"]
    ]


def markdown(content: Mapping[str, Any]) -> str:
    """The table."""
    facts = content["facts"]
    memory = f"{facts['memory_bytes'] / 2**30:.0f} GiB"
    lines = [
        f"# {facts['device']}, {(content['finished'] or 'nothing was run')[:10]}",
        "",
        f"{memory}, {facts['multiprocessors']} multiprocessors, compute capability {facts['capability']}; driver "
        f"{facts['driver']}, CUDA {facts['cuda']} (nvcc {facts['nvcc']}), torch {facts['torch']}, kronfac "
        f"{facts['kronfac']}, commit {facts['commit'] or 'unknown'}, sources {facts['sources']}. Made by "
        "`make gpu-check` ([what it does](../../README.md#gpus)).",
        "",
        "| part | result | seconds | |",
        "|---|---|---|---|",
        *(_part_line(part, content["parts"].get(part)) for part in PARTS),
    ]
    found = content["parts"].get("bench", {}).get("found", {})
    if found.get("peaks"):
        peaks = found["peaks"]
        rates = ", ".join(f"{name} {peaks[name] / 1e12:.1f}" for name in ("bf16", "tf32", "float32", "float64"))
        lines += [
            "",
            f"Peaks: products of order 8192 by torch at {rates} TFLOP/s; copying at {peaks['memory'] / 1e12:.2f} TB/s, "
            "read and written.",
        ]
    if results(content):
        lines += [
            "",
            "Medians; **ratio** is torch's time over ours, with its quartiles; **share** that of nominal work in the "
            "peak named; **error** relative to float64, ours and torch's.",
            "",
            "| operator | case | time | torch | ratio | bar | share of peak | error | torch's error |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_case_line, results(content)),
        ]
    if steps(content):
        lines += [
            "",
            "| steps | SGD | K-FAC: plain | with statistics | with inverses | ratio of whole periods | bar |",
            "|---|---|---|---|---|---|---|",
            *map(_step_line, steps(content)),
        ]
    return "\n".join(lines) + "\n"


def _part_line(part: str, record: Mapping[str, Any] | None) -> str:
    if record is None:
        return f"| {part} | not run | | |"
    return f"| {part} | {record['status']} | {record['seconds']:.0f} | {_cell(_remark(record))} |"


def _remark(record: Mapping[str, Any]) -> str:
    if record["message"]:
        return str(record["message"])[:400]
    found = record["found"]
    remarks = [
        f"{name}: {counts['tests'] - counts['skipped']} tests, {counts['skipped']} skipped"
        for name, counts in found.get("tests", {}).items()
    ]
    remarks += [f"{name}: {tool['cases']} cases, {tool['summary']}" for name, tool in found.get("tools", {}).items()]
    return "; ".join(remarks)


def _case_line(case: Mapping[str, Any]) -> str:
    sides = case["sides"]
    rival = sides[case["rival"]]
    low, high = case["ratio_quartiles"]
    wrong = "" if case["correct"] else " **wrong**"
    bar = "" if case["bar"] is None else f"{case['bar']:.2f}x {'met' if case['ratio'] >= case['bar'] else '**missed**'}"
    cells = (
        f"`{case['op']}`",
        case["case"],
        duration(sides["kronfac"]["median"]),
        duration(rival["median"]),
        f"{case['ratio']:.2f}x ({low:.2f}-{high:.2f})",
        bar,
        f"{case['fraction_of_peak']:.0%} {case['peak']}",
        number(sides["kronfac"]["error"]) + wrong,
        number(rival["error"]),
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _step_line(entry: Mapping[str, Any]) -> str:
    kinds = entry["sides"]["kronfac"]["kinds"]
    low, high = entry["ratio_quartiles"]
    cells = (
        entry["case"],
        duration(entry["sgd_median"]),
        *(duration(kinds[kind]["median"]) for kind in ("plain", "factor", "inverse")),
        f"{entry['ratio']:.3f}x ({low:.3f}-{high:.3f})",
        f"{entry['bar']:.2f}x {'met' if entry['ratio'] <= entry['bar'] else '**missed**'}",
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def number(value: float | None) -> str:
    """An error; what was not finite is not there as a number any more."""
    return "not finite" if value is None else f"{value:.0e}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
