"""Times on the GPU: CUDA events around single calls, rivals by turns, the L2 cache empty before each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kronfac.cli.bench.measure import MIN_ROUNDS, Timing

SECONDS = 1.0
"""About how long the rounds of a case take together."""
MOST_ROUNDS = 100
LEAST_FLUSH = 128 << 20


class Stopwatch:
    """Times calls between events of the current stream.

    Overwriting an array of twice the L2 cache stands before each call: what a call needs comes from memory, as in
    training, and the processor is ahead of the GPU when a short call begins, so that its launch is not timed.
    """

    def __init__(self) -> None:
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        self._flush = torch.empty(max(LEAST_FLUSH, 2 * cache), dtype=torch.uint8, device="cuda")

    def start(self, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Queue one call; the time between the events is there once the device has got there."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        first.record()
        call()
        last.record()
        return first, last

    def seconds(self, call: Callable[[], object]) -> float:
        """Time one call and wait for it."""
        first, last = self.start(call)
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    def by_turns(self, sides: Mapping[str, Callable[[], object]], seconds: float = SECONDS) -> dict[str, Timing]:
        """Time several callables A B A B ..., after each ran twice unseen; at least `MIN_ROUNDS` times each."""
        once = 0.0
        for call in sides.values():
            call()
            once += self.seconds(call)
        rounds = int(min(MOST_ROUNDS, max(MIN_ROUNDS, seconds / max(once, 1e-6))))
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, call in sides.items():
                events[name].append(self.start(call))
        torch.cuda.synchronize()
        return {
            name: Timing(tuple(first.elapsed_time(last) * 1e-3 for first, last in pairs))
            for name, pairs in events.items()
        }
