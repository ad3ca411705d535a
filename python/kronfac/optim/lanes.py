"""Where inverses are made beside the training: in a thread on the CPU, and on CUDA devices on a stream of its own too.

The training's stream and the other one meet at two events and nowhere else. The snapshot of the averages is there
before the first; what was made of it, before the second. Memory that one stream hands over to the other is recorded on
it, so that the caching allocator does not give it away while the other stream still works with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, cuda

from kronfac.optim.structures import Averages, Factorisation


def has_lanes(device: torch.device) -> bool:
    """Whether a device works in streams that a thread can choose."""
    return device.type == "cuda"


def runs_beside(device: torch.device) -> bool:
    """Whether inverses of layers there can be made beside the training."""
    return device.type == "cpu" or has_lanes(device)


class Lanes:
    """The streams for inverses, one for each device, made when they are first needed."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def cross(self, factors: Iterable[Averages]) -> Crossing:
        """Hand averages over; they must have been computed, or queued, on the current streams."""
        tensors = [tensor for some in factors for tensor in (some.A, some.G, *some.extra.values())]
        devices = {tensor.device: None for tensor in tensors if has_lanes(tensor.device)}
        for device in devices:
            if device not in self._streams:
                self._streams[device] = cuda.Stream(device)  # type: ignore[no-untyped-call]
        return Crossing([self._streams[device] for device in devices], tensors)


class Crossing:
    """One hand-over from the training's streams to the others and back.

    Without a device that has streams it does nothing.

    Args:
        streams: to work on, each of another device.
        tensors: handed over.
    """

    def __init__(self, streams: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        self._streams = list(streams)
        self._begun = [_record(cuda.current_stream(stream.device)) for stream in self._streams]
        self._ended: list[Any] = []
        by_device = {stream.device: stream for stream in self._streams}
        for tensor in tensors:
            if tensor.device in by_device:
                tensor.record_stream(by_device[tensor.device])

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Make the streams this thread's current ones, once what was handed over is there."""
        with ExitStack() as stack:
            for stream, begun in zip(self._streams, self._begun, strict=True):
                stack.enter_context(cuda.stream(stream))  # of this thread only; and the device
                stream.wait_event(begun)
            yield
            self._ended = [_record(stream) for stream in self._streams]

    def back(self, values: Iterable[Factorisation | None]) -> None:
        """Have the current streams wait for what was made, and keep its memory until they are done with it."""
        streams = {}
        for stream, ended in zip(self._streams, self._ended, strict=bool(self._ended)):
            streams[stream.device] = cuda.current_stream(stream.device)
            streams[stream.device].wait_event(ended)
        for tensor in (tensor for value in values for tensor in (value or {}).values()):
            if tensor.device in streams:
                tensor.record_stream(streams[tensor.device])


def _record(stream: Any) -> Any:
    event = cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
