"""One side of `bench/compare.py`: measures the kronfac of the Python that runs it, one sample whenever it is asked.

Cases and measuring come from the checkout that this file lies in, for both sides; only the operators differ. One JSON
object per line comes in and one goes out:

    {"prepare": "covariance[16x8]", "threads": 1, "sample_seconds": 0.01}  ->  {"correct": true, "errors": {...}}
    {"sample": true}                                                       ->  {"seconds": 9.6e-06}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kronfac.cli

# The package that is measured may be older than the cases: take everything under kronfac.cli from here.
kronfac.cli.__path__.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "kronfac" / "cli"))

import torch  # noqa: E402

from kronfac.cli.bench.case import OURS, verdict  # noqa: E402
from kronfac.cli.bench.cases import CASES  # noqa: E402
from kronfac.cli.bench.measure import calls_per_sample  # noqa: E402
from kronfac.cli.bench.operators import prepare  # noqa: E402


def main() -> None:
    """Answer requests until the input ends."""
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cases = {case.key: case for case in CASES}
    call: Callable[[], Any] = lambda: None  # noqa: E731 (replaced by the first request)
    calls = 1
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            torch.set_num_threads(request["threads"])
            call = lambda: None  # noqa: E731 (frees the inputs of the case before)
            contest = prepare(cases[request["prepare"]])
            sides = {name: side for name, side in contest.sides.items() if name not in contest.not_torch}
            errors = {name: contest.error(side()) for name, side in sides.items()}
            call = contest.sides[OURS]
            calls = calls_per_sample(timed(call, 1), request["sample_seconds"])
            answer: dict[str, Any] = {"correct": verdict(errors, contest.tolerance), "errors": errors}
            del contest, sides
        else:
            answer = {"seconds": timed(call, calls) / calls}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(call: Callable[[], Any], calls: int) -> float:
    """Seconds that `calls` calls take."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
