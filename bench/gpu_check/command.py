"""The command line."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import bench.gpu_check
from bench.gpu_check import machine, report
from bench.gpu_check.files import write_json
from bench.gpu_check.groups import GROUPS
from bench.gpu_check.parts import LIMIT, PARTS, PartError, Place
from bench.process import ROOT


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; see `bench.gpu_check` for the exit status."""
    options = _parser().parse_args(arguments)
    try:
        machine.require_gpu()
        facts = machine.facts()
    except machine.UnusableError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    place = Place(options.state.resolve(), options.groups)
    place.state.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), flush=True)
    for part in options.parts:
        record = run_part(part, place, facts)
        write_json(place.state / f"{part}.json", record)
        print(f"{part}: {record['status']} in {record['seconds']:.0f} s", flush=True)
    records, left_out = report.read_records(place.state, options.out, facts)
    for message in left_out:
        print(f"gpu-check: {message}", file=sys.stderr)
    document = report.document(facts, records)
    table, _ = report.save(options.out, document)
    print(f"\n{report.markdown(document)}\n{table}", flush=True)
    failed = [part for part in options.parts if records[part]["status"] != "passed"]
    for part in failed:
        print(f"gpu-check: {part} failed: {records[part]['message'].splitlines()[0]}", file=sys.stderr)
    missed = report.missed_bars(document)
    for message in missed:
        print(f"gpu-check: below its bar: {message}", file=sys.stderr)
    return 1 if failed or (missed and options.bars) else 0


def run_part(part: str, place: Place, facts: dict[str, Any]) -> dict[str, Any]:
    """Run one part; whatever becomes of it, its record says so."""
    print(f"== {part}", flush=True)
    start = time.monotonic()
    place.deadline = start + LIMIT
    status, message, found = "passed", "", dict[str, Any]()
    try:
        found = PARTS[part](place)
    except PartError as error:
        status, message, found = "failed", str(error), error.found
    except Exception as error:
        status, message = "failed", f"{type(error).__name__}: {error}"
    return {
        "part": part,
        "status": status,
        "message": message,
        "seconds": time.monotonic() - start,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "facts": facts,
        "found": report.plain(found),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=bench.gpu_check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def some_of(known: list[str], what: str) -> Any:
        def parse(text: str) -> list[str]:
            names = [name for name in text.split(",") if name]
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; expected some of {', '.join(known)}")
            return [name for name in known if name in names]

        return parse

    parts, state = list(PARTS), ROOT / "build" / "gpu-check"
    parser.add_argument("--parts", type=some_of(parts, "part"), default=parts, help="separated by commas; default: all")
    parser.add_argument(
        "--groups",
        type=some_of(list(GROUPS), "group"),
        default=[],
        help=f"of bench; default: all of {', '.join(GROUPS)}",
    )
    parser.add_argument(
        "--state", type=Path, default=state, metavar="DIR", help="records and objects (build/gpu-check)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "gpu", metavar="DIR", help="default: bench/results/gpu"
    )
    parser.add_argument("--bars", action="store_true", help="exit status 1 where a time misses its bar")
    return parser
