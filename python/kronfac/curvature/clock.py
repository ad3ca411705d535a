"""Where a step's time goes, measured only while somebody asks: otherwise a phase costs one look at a variable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_local = threading.local()


class Clock:
    """Adds up the seconds of the phases of a step.

    On an accelerator the host waits for the device at the borders of a phase, which itself costs time.

    Args:
        device: that the phases run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._inner = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase of the last completed step, the forwards before it included."""
        return dict(self._last)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`; phases inside this one are counted for themselves only."""
        outer, self._inner = self._inner, 0.0
        begun = self._now()
        try:
            yield
        finally:
            spent = self._now() - begun
            self._running[name] = self._running.get(name, 0.0) + spent - self._inner
            self._inner = outer + spent

    @contextmanager
    def active(self) -> Iterator[None]:
        """Functions marked with `timed` count for this clock inside, in this thread."""
        before = getattr(_local, "clock", None)
        _local.clock = self
        try:
            yield
        finally:
            _local.clock = before

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._running[name] = self._running.get(name, 0.0) + seconds

    def finish(self) -> None:
        """The step is over."""
        self._last, self._running = self._running, {}

    def _now(self) -> float:
        if self._device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def timed(phase: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Count a function's time for a phase of the active clock, or of the clock of the object that it is a method of.

    Args:
        phase: the name that the time is added to.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            clock: Clock | None = getattr(_local, "clock", None)
            if clock is None and args:
                clock = _own_clock(args[0])
            if clock is None:
                return function(*args, **kwargs)
            with clock.phase(phase):
                return function(*args, **kwargs)

        return wrapper

    return decorate


def _own_clock(first: Any) -> Clock | None:
    clock = getattr(first, "clock", None)
    return clock if isinstance(clock, Clock) else None
