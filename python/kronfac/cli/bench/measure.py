"""Timing by turns: rivals are timed right beside what they are compared with, so that a slow minute hits both."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Clock = Callable[[], float]
Result = TypeVar("Result")
MIN_ROUNDS = 7  # a median of fewer says little on a machine that does other things too
MAX_CALLS = 100_000


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one side, one sample per round.

    Attributes:
        samples: seconds per call, in the order of the rounds.
        calls: calls that one sample is the mean of.
    """

    samples: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        """Median of the samples, in seconds per call."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the samples."""
        return quartiles(self.samples)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one side took than the other.

    Attributes:
        value: ratio of the medians.
        low, high: first and third quartile of the ratios within each round.
    """

    value: float
    low: float
    high: float


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, interpolated linearly; of one sample, twice that sample."""
    if len(samples) == 1:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def ratio(rival: Timing, ours: Timing) -> Ratio:
    """How many times longer `rival` took than `ours`; the two were timed by turns.

    Raises:
        ValueError: different numbers of rounds, so that they cannot have been.
    """
    if len(rival.samples) != len(ours.samples):
        raise ValueError(
            f"ratio: {len(rival.samples)} and {len(ours.samples)} rounds are no pairs; time both sides by turns"
        )
    low, high = quartiles([a / b for a, b in zip(rival.samples, ours.samples, strict=True)])
    return Ratio(rival.median / ours.median, low, high)


def by_turns(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int = MIN_ROUNDS,
    sample_seconds: float = 0.01,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time several callables A B A B ...

    Each is called once unseen (first touches, lazy initialisation), then timed once to choose how many calls make a
    sample.

    Args:
        sides: what to time, by name.
        rounds: samples of each side, >= 1.
        sample_seconds: least length of a sample; short calls are repeated to fill it.
        clock: seconds, monotonic.

    Returns:
        A timing per side, in the order of `sides`.
    """
    if rounds < 1:
        raise ValueError(f"by_turns: rounds: expected at least 1, got {rounds}")
    calls: dict[str, int] = {}
    for name, call in sides.items():
        call()
        calls[name] = calls_per_sample(_sample(call, 1, clock), sample_seconds)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            samples[name].append(_sample(call, calls[name], clock))
    return {name: Timing(tuple(samples[name]), calls[name]) for name in sides}


def calls_per_sample(seconds_per_call: float, sample_seconds: float) -> int:
    """How many calls fill a sample of at least `sample_seconds`."""
    if seconds_per_call <= 0:  # below the resolution of the clock
        return MAX_CALLS
    return max(1, min(MAX_CALLS, math.ceil(sample_seconds / seconds_per_call)))


def _sample(call: Callable[[], object], calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


@contextmanager
def threads(count: int) -> Iterator[bool]:
    """Run with `count` threads in torch and, where threadpoolctl is installed, in numpy's and scipy's libraries.

    Yields:
        Whether numpy and scipy were limited too; where not, they must not be compared with.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        try:
            from threadpoolctl import threadpool_limits
        except ModuleNotFoundError:
            yield False
        else:
            # Only BLAS: torch's own OpenMP pool is set above.
            with threadpool_limits(limits=count, user_api="blas"):
                yield True
    finally:
        torch.set_num_threads(before)


def peak_memory(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """Call once and see how much further the resident memory of the process rose meanwhile, outputs included.

    Memory that was handed out before and is kept for reuse counts as there already: only a first call tells what a
    cold process needs.

    Returns:
        What `call` returned, and bytes; None where the system keeps no high-water mark that can be reset (Linux does).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system and is counted anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: reset VmHWM to the present size
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")
