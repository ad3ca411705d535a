"""Inverses made by a background thread while training goes on (`max_staleness`).

The rule is one of steps, not of clocks: what is asked for at step k is taken into use at step k + max_staleness, and
that step waits if it is not ready. Training is then the same however fast the thread is, on every rank of a process
group, and after a resume.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kronfac.curvature.clock import timed
from kronfac.optim.lanes import Crossing, Lanes, runs_beside
from kronfac.optim.layers import Layer
from kronfac.optim.refresh import factorise
from kronfac.optim.structures import Averages, Factorisation, Structures


@dataclass(frozen=True)
class Finished:
    """Inverses that wait to be taken into use; what a checkpoint stores of a request.

    Attributes:
        made: the step at which they were asked for.
        values: a factorisation by layer name, None where a factor resisted every attempt.
        retries: factors that needed more damping than asked for.
    """

    made: int
    values: Mapping[str, Factorisation | None]
    retries: int


@dataclass(frozen=True)
class Arrived:
    """What a step takes into use.

    Attributes:
        values: the newest good factorisation by layer name.
        made: the step that each was asked for at.
        retries: factors that needed more damping than asked for.
        failures: layers that could not be inverted; they keep what they have.
    """

    values: Mapping[str, Factorisation] = field(default_factory=dict)
    made: Mapping[str, int] = field(default_factory=dict)
    retries: int = 0
    failures: int = 0


class Background:
    """Requests for inverses, oldest first, and the thread that works on them.

    The thread lives only while there is work, so that nothing is left to end: an interpreter that exits waits for the
    factorisation under way and drops the others. On CUDA devices it works on streams of its own, which the device runs
    beside the training's; the thread is there because factorising waits for the device, and the training must not.

    Args:
        max_staleness: steps between asking for inverses and their use, >= 1.

    Attributes:
        max_staleness: as given.
        seconds: how long the thread worked on what was taken into use last.
    """

    def __init__(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self.seconds = 0.0
        self._requests: list[_Request] = []
        self._worker = _Worker()
        self._lanes = Lanes()

    def check(self, layers: Sequence[Layer]) -> None:
        """Refuse layers that the thread could not work on beside the training.

        Raises:
            ValueError: a layer is neither on the CPU nor on a CUDA device.
        """
        for layer in layers:
            if not runs_beside(layer.device):
                raise ValueError(
                    f"KFAC: max_staleness: expected 0 with layers on another device than the CPU or a CUDA device, got "
                    f"{self.max_staleness} and layer {layer.name!r} on {layer.device}; its kernels would wait in line "
                    "with the training's"
                )

    def raise_errors(self) -> None:
        """Report what went wrong in the thread, once; the request is dropped and the layers keep what they have.

        Raises:
            RuntimeError: from the exception of the thread.
        """
        for request in self._requests:
            if request.error is not None:
                self._requests.remove(request)
                raise RuntimeError(
                    f"KFAC: the inverses asked for at step {request.made} could not be made in the background; "
                    "the last good ones are kept"
                ) from request.error

    @timed("wait")
    def arrive(self, step: int) -> Arrived:
        """What is due at a step; waits until it is there. Nothing changes before `retire`.

        Raises:
            RuntimeError: as `raise_errors`.
        """
        values: dict[str, Factorisation] = {}
        made: dict[str, int] = {}
        retries = failures = 0
        for request in self._due(step):
            finished = self._finish(request)
            retries += finished.retries
            for name, value in finished.values.items():
                if value is None:
                    failures += 1
                else:
                    values[name], made[name] = value, finished.made
        return Arrived(values, made, retries, failures)

    def retire(self, step: int) -> None:
        """Forget what `arrive` returned: the step was taken."""
        due = self._due(step)
        if due:
            self.seconds = sum(request.seconds for request in due)
            self._requests = [request for request in self._requests if request not in due]

    def submit(
        self,
        step: int,
        structure: Structures,
        layers: Sequence[Layer],
        factors: Sequence[Averages],
        damping: Sequence[float],
    ) -> None:
        """Ask for inverses.

        Args:
            step: that they belong to.
            structure: how factors are inverted.
            layers: to invert; nothing happens when there are none.
            factors: of each layer; nobody writes into them any more.
            damping: of each layer.
        """
        if not layers:
            return
        crossing = self._lanes.cross(factors)
        request = _Request(step, _Job(structure, list(layers), list(factors), list(damping), crossing))
        self._requests.append(request)
        self._worker.put(request)

    def keep(self, names: Collection[str]) -> None:
        """Drop what was asked for on behalf of other layers than these."""
        for request in self._requests:
            request.dropped.update(set(request.names) - set(names))

    def forget(self) -> None:
        """Drop all requests; what is under way runs to its end and is not looked at."""
        self._worker.clear()
        self._requests = []

    def finished(self) -> list[Finished]:
        """Wait for all requests and return their results, oldest first.

        Raises:
            RuntimeError: as `raise_errors`.
        """
        return [self._finish(request) for request in list(self._requests)]

    def adopt(self, finished: Sequence[Finished]) -> None:
        """Replace all requests by results from a checkpoint."""
        self.forget()
        self._requests = [_Request.of(some) for some in finished]

    @property
    def pending(self) -> tuple[int, ...]:
        """The steps whose inverses were asked for and are not in use yet."""
        return tuple(request.made for request in self._requests)

    def held(self) -> dict[str, list[Factorisation]]:
        """By layer name, the results that are there already, without waiting."""
        result: dict[str, list[Factorisation]] = {}
        for request in self._requests:
            for name, value in (request.values or {}).items():
                if value is not None and name not in request.dropped:
                    result.setdefault(name, []).append(value)
        return result

    def is_due(self, step: int) -> bool:
        """Whether inverses are to be taken into use at a step."""
        return bool(self._due(step))

    def _due(self, step: int) -> list[_Request]:
        return [request for request in self._requests if request.made + self.max_staleness <= step]

    def _finish(self, request: _Request) -> Finished:
        self._worker.wait(request)
        if request.error is not None:
            self.raise_errors()
        assert request.values is not None
        if request.crossing is not None:
            request.crossing.back(request.values.values())
        values = {name: value for name, value in request.values.items() if name not in request.dropped}
        return Finished(request.made, values, request.retries)


@dataclass(frozen=True)
class _Job:
    """The arguments of a call of `factorise`."""

    structure: Structures
    layers: list[Layer]
    factors: list[Averages]
    damping: list[float]
    crossing: Crossing


class _Request:
    """A job and, once `done` is set, what came of it."""

    def __init__(self, made: int, job: _Job | None = None) -> None:
        self.made = made
        self.job = job
        self.crossing = None if job is None else job.crossing
        self.pid = os.getpid()
        self.names: tuple[str, ...] = () if job is None else tuple(layer.name for layer in job.layers)
        self.dropped: set[str] = set()
        self.done = threading.Event()
        self.values: dict[str, Factorisation | None] | None = None
        self.retries = 0
        self.seconds = 0.0
        self.error: BaseException | None = None

    @classmethod
    def of(cls, finished: Finished) -> _Request:
        request = cls(finished.made)
        request.names = tuple(finished.values)
        request.values, request.retries = dict(finished.values), finished.retries
        request.done.set()
        return request

    def run(self) -> None:
        """Do the job; nothing is raised."""
        job = self.job
        assert job is not None
        begun = time.perf_counter()
        try:
            with torch.no_grad(), job.crossing.beside():  # a thread begins with gradients on
                values, self.retries = factorise(job.structure, job.layers, job.factors, job.damping)
            self.values = dict(zip(self.names, values, strict=True))
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - begun
        self.job = None  # the factors are not needed any longer
        self.done.set()


class _Worker:
    """Runs requests one after the other in a thread that ends when there are none.

    The thread is no daemon: one that wakes up inside torch while the interpreter is taken down aborts the process.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._running = False

    def put(self, request: _Request) -> None:
        """Have a request run."""
        if self._pid != os.getpid():
            self._start_anew()
        with self._lock:
            self._waiting.append(request)
            if self._running:
                return
            self._running = True
        try:
            threading.Thread(target=self._work, name="kronfac-inverses").start()
        except RuntimeError:  # no more threads, or the interpreter is at its end: `wait` does the work
            with self._lock:
                self._running = False

    def wait(self, request: _Request) -> None:
        """Return when a request is done; where no thread will do it, do it here."""
        if self._pid != os.getpid():
            self._start_anew()  # the lock may have been held by the thread, which a fork does not bring along
        if request.values is not None or request.error is not None:
            return
        if request.pid != self._pid:
            request.pid, request.done = self._pid, threading.Event()
            request.run()
        while not request.done.is_set():
            with self._lock:
                left_behind = not self._running and request in self._waiting
                if left_behind:
                    self._waiting.remove(request)
            if left_behind:
                request.run()
            else:
                request.done.wait(1.0)  # now and then a look whether the thread is still there

    def clear(self) -> None:
        """Drop the requests that are not being worked on yet."""
        if self._pid != os.getpid():
            self._start_anew()
        with self._lock:
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                # At the interpreter's end its main thread is over first; nobody will ask for the rest.
                if not self._waiting or not threading.main_thread().is_alive():
                    self._running = False
                    return
                request = self._waiting.popleft()
            request.run()
