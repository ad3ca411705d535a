"""What this machine can do at most: the denominators of "fraction of the peak"."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

from kronfac import _host

ARRAY_BYTES = 256 << 20  # per thread and array; several times the cache that one core can fill


@dataclass(frozen=True)
class Peak:
    """Rates that loops without anything else in them reach.

    Attributes:
        isa: instruction set of the loops.
        threads: how many ran at once; rates are of all together.
        float32, float64: floating-point operations per second of multiply-adds in registers.
        copy: bytes per second, read and written, of copying an array much larger than the caches.
        read: bytes per second of summing one.
    """

    isa: str
    threads: int
    float32: float
    float64: float
    copy: float
    read: float

    @property
    def memory(self) -> float:
        """The higher of the two rates of memory, in bytes per second."""
        return max(self.copy, self.read)


def measure_peak(
    isa: str, threads: int, *, seconds: float = 0.1, rounds: int = 5, array_bytes: int = ARRAY_BYTES
) -> Peak:
    """Measure the peak of one instruction set with `threads` threads at once.

    The highest of several rounds counts: what disturbs a loop only ever slows it down.

    Args:
        isa: one of `kronfac._host.instruction_sets()`.
        threads: how many threads run the loops at the same time.
        seconds: length of one round.
        rounds: how many rounds of each loop.
        array_bytes: size of the arrays of each thread.
    """

    def best(loop: Callable[[], float], count: int = rounds) -> float:
        return max(_together(loop, threads) for _ in range(count))

    # Arithmetic needs no warm caches: many short rounds find one in which nobody else ran.
    short, many = seconds / 10, 10 * rounds
    return Peak(
        isa=isa,
        threads=threads,
        float32=best(lambda: _host.peak_flops(isa, "float32", short), many),
        float64=best(lambda: _host.peak_flops(isa, "float64", short), many),
        copy=best(lambda: _host.copy_bandwidth(isa, array_bytes, seconds)),
        read=best(lambda: _host.read_bandwidth(isa, array_bytes, seconds)),
    )


def _together(loop: Callable[[], float], threads: int) -> float:
    """The sum of the rates of `threads` threads that start together; the loops release the GIL."""
    if threads == 1:
        return loop()
    barrier = Barrier(threads)

    def run(_: int) -> float:
        barrier.wait()
        return loop()

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(run, range(threads)))
