"""Measures cases: error first, then times by turns, then the share of the measured peak."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kronfac.cli.bench.case import OURS, Case, Contest, verdict
from kronfac.cli.bench.measure import MIN_ROUNDS, Timing, by_turns, peak_memory, ratio, threads
from kronfac.cli.bench.peak import Peak


@dataclass(frozen=True)
class Settings:
    """How long to look.

    Attributes:
        rounds: samples per side.
        sample_seconds: least length of one.
    """

    rounds: int = MIN_ROUNDS
    sample_seconds: float = 0.01


def prepare(case: Case) -> Contest:
    """Allocate a case's inputs: the same ones whatever else was measured before."""
    torch.manual_seed(zlib.crc32(case.key.encode()))
    return case.prepare()


def run_case(case: Case, thread_count: int, settings: Settings, peak: Peak | None) -> dict[str, Any]:
    """Measure one case with one number of threads; the result is one entry of a report."""
    with threads(thread_count) as libraries_follow:
        contest = prepare(case)
        sides: dict[str, Callable[[], Any]] = {
            name: call for name, call in contest.sides.items() if libraries_follow or name not in contest.not_torch
        }
        errors: dict[str, float] = {}
        memory: dict[str, int | None] = {}
        for name, call in sides.items():
            result, memory[name] = peak_memory(call)
            errors[name] = contest.error(result)
            del result
        timings = by_turns(sides, rounds=settings.rounds, sample_seconds=settings.sample_seconds)
    found = entry(case, thread_count, timings, errors, verdict(errors, contest.tolerance), peak)
    for name, extra in memory.items():
        found["sides"][name]["peak_memory"] = extra
    return found


def entry(
    case: Case,
    thread_count: int,
    timings: dict[str, Timing],
    errors: dict[str, float],
    correct: bool,
    peak: Peak | None,
) -> dict[str, Any]:
    """What a report says about one case."""
    ours = timings[OURS]
    rivals = [name for name in timings if name != OURS]
    against = {name: ratio(timings[name], ours) for name in rivals}
    rate = case.work / ours.median
    ceiling = None if peak is None else (peak.memory if case.unit == "byte" else peak.float32)
    return {
        "op": case.op,
        "case": case.name,
        "threads": thread_count,
        "correct": correct,
        "work": case.work,
        "unit": case.unit,
        "rate": rate,
        "fraction_of_peak": None if ceiling is None else rate / ceiling,
        "rival": rivals[0],
        "ratio": against[rivals[0]].value,
        "ratio_quartiles": [against[rivals[0]].low, against[rivals[0]].high],
        "sides": {
            name: {
                "median": timing.median,
                "quartiles": list(timing.spread),
                "samples": list(timing.samples),
                "calls_per_sample": timing.calls,
                "error": errors[name],
                "ratio": against[name].value if name in against else 1.0,
            }
            for name, timing in timings.items()
        },
    }
