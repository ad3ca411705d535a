"""Every operator at the sizes of real networks; the rival is timed between the rounds, so both see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from kronfac.cli.bench.case import OURS, Case, verdict
from kronfac.cli.bench.cases import select
from kronfac.cli.bench.measure import MIN_ROUNDS, Timing, calls_per_sample, threads
from kronfac.cli.bench.operators import entry, prepare
from kronfac.cli.bench.peak import Peak

SAMPLE_SECONDS = 0.01


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and number of threads."""
    config = metafunc.config
    metafunc.parametrize("case", select(quick=config.getoption("--quick")), ids=lambda case: case.key)
    metafunc.parametrize("thread_count", [int(part) for part in config.getoption("--threads").split(",")])


def test_operator(benchmark: Any, case: Case, thread_count: int, peak_of: Callable[[int], Peak]) -> None:
    peak = peak_of(thread_count)
    with threads(thread_count) as libraries_follow:
        contest = prepare(case)
        sides = {n: call for n, call in contest.sides.items() if libraries_follow or n not in contest.not_torch}
        errors = {name: contest.error(call()) for name, call in sides.items()}
        correct = verdict(errors, contest.tolerance)
        assert correct, f"{case.key}: errors {errors}"
        calls = {name: calls_per_sample(timed(call, 1), SAMPLE_SECONDS) for name, call in sides.items()}
        samples: dict[str, list[float]] = {name: [] for name in sides}

        def before_round() -> None:
            benchmark.stats.iterations = calls[OURS]  # the table then shows the time of one call
            for name in samples:
                if name != OURS:
                    samples[name].append(timed(sides[name], calls[name]))

        def one_round() -> None:
            samples[OURS].append(timed(sides[OURS], calls[OURS]))

        benchmark.group = case.op
        benchmark.pedantic(one_round, setup=before_round, rounds=MIN_ROUNDS)
    timings = {name: Timing(tuple(collected), calls[name]) for name, collected in samples.items()}
    benchmark.extra_info.update(entry(case, thread_count, timings, errors, correct, peak))


def timed(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
