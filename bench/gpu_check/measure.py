"""`python -m bench.gpu_check.measure GROUP FILE`: times one group of cases and writes what it found after each."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.cases import GpuCase, cases
from bench.gpu_check.files import write_json
from bench.gpu_check.machine import about
from bench.gpu_check.peak import Peaks, measure_peaks, tf32
from bench.gpu_check.report import plain
from bench.gpu_check.timing import Stopwatch
from kronfac.cli.bench.case import verdict
from kronfac.cli.bench.operators import entry, prepare
from kronfac.cli.bench.peak import Peak
from kronfac.cli.bench.report import result_line


def main(group: str, target: Path) -> int:
    """0: all cases were measured and right; 1: the file names those that were not."""
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = False
    watch = Stopwatch()
    found: dict[str, Any] = {"about": about(), "results": [], "steps": [], "failed": []}
    if group == "steps":
        from bench.gpu_check.steps import CONFIGURATIONS, measure_steps

        for configuration in CONFIGURATIONS:
            try:
                found["steps"].append(measure_steps(configuration))
            except Exception as error:  # whatever it is, it is this case's, and the others have theirs
                found["failed"].append(_failure("KFAC step", configuration.name, error))
            write_json(target, plain(found))
        return 1 if found["failed"] else 0
    peaks = measure_peaks(watch)
    found["peaks"] = asdict(peaks)
    for gpu_case in cases(group):
        try:
            result = measure(gpu_case, watch, peaks)
        except Exception as error:  # as above
            found["failed"].append(_failure(gpu_case.case.op, gpu_case.name, error))
        else:
            found["results"].append(result)
            print(result_line(result), flush=True)
            if not result["correct"]:
                found["failed"].append({"op": result["op"], "case": result["case"], "message": "wrong result"})
        torch.cuda.empty_cache()
        write_json(target, plain(found))
    return 1 if found["failed"] else 0


def measure(gpu_case: GpuCase, watch: Stopwatch, peaks: Peaks) -> dict[str, Any]:
    """Error first, then times by turns; an entry as those of `kronfac bench`, and the bar."""
    rates = asdict(peaks)
    ceiling = Peak("cuda", 0, rates[gpu_case.unit], peaks.float64, peaks.memory, peaks.memory)
    with tf32(gpu_case.unit == "tf32"):
        contest = prepare(gpu_case.case)
        errors = {name: contest.error(call()) for name, call in contest.sides.items()}
        timings = watch.by_turns(contest.sides)
    correct = verdict(errors, contest.tolerance)
    found = entry(gpu_case.case, 0, timings, errors, correct, ceiling)
    return found | {"case": gpu_case.name, "peak": gpu_case.unit, "bar": gpu_case.bar, "rounds": _rounds(found)}


def _rounds(found: dict[str, Any]) -> int:
    return min(len(side["samples"]) for side in found["sides"].values())


def _failure(op: str, case: str, error: Exception) -> dict[str, str]:
    return {"op": op, "case": case, "message": f"{type(error).__name__}: {str(error).splitlines()[0][:500]}"}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
