"""Three clocks that run only while training: wall, processor, and waiting for a processor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path


class Clock:
    """Seconds of the sections it was put around.

    Attributes:
        wall: elapsed.
        cpu: used by all threads of the process.
        waited: spent by its threads ready to run while no processor was free; 0 where the kernel does not say.
    """

    def __init__(self, wall: float = 0.0, cpu: float = 0.0, waited: float = 0.0) -> None:
        self.wall, self.cpu, self.waited = wall, cpu, waited

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        waited, cpu, wall = _waited(), time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
            self.waited += max(0.0, _waited() - waited)

    def state(self) -> dict[str, float]:
        """What the constructor takes to continue."""
        return {"wall": self.wall, "cpu": self.cpu, "waited": self.waited}


def _waited() -> float:
    """Run-queue delay of the process's threads so far, in seconds (Linux, proc(5): schedstat)."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        # Where it fails the thread has just ended, or the kernel keeps no such figures.
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int(path.read_text().split()[1])
    return total / 1e9


MOST_WAITED = 0.1
LEAST_BUSY = 0.5


def disturbance(wall: float, cpu: float, waited: float, threads: int) -> str | None:
    """Why the times of a run say little, or None.

    A run is disturbed if its threads waited for a processor for more than a tenth of its time, or if they used less
    than half of what was theirs: other processes on the same processors do the first, a host that takes processors
    away does the second.

    Args:
        wall: seconds of training.
        cpu: processor seconds in these.
        waited: seconds in which a thread was ready and did not run, summed over the threads.
        threads: of the run.
    """
    if wall <= 0:
        return None
    if waited > MOST_WAITED * wall:
        return f"its threads waited {waited:.1f} s for a processor in {wall:.1f} s"
    if cpu < LEAST_BUSY * threads * wall:
        return f"{cpu:.1f} s of processor time in {wall:.1f} s with {threads} thread(s)"
    return None
