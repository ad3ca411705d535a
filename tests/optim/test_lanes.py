"""Inverses on streams of their own: who waits for whom, with streams and events that write down what is asked of them.

The real ones are in tests/optim/test_cuda.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kronfac.optim import KFAC, background, lanes, reading
from tests.optim.models import equal, mlp, snapshot, train_step, vectors
from tests.optim.test_background import THREAD

TRAINING, SIDE = "training", "side"


class Device:
    """Streams of a device that work at once, and the order in which things were asked of them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.current = threading.local()
        self.recorded: dict[int, set[str]] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lanes, "has_lanes", lambda device: device.type == "cpu")
        monkeypatch.setattr(lanes, "cuda", SimpleNamespace(
            Stream=lambda device: self.stream(SIDE, device),
            current_stream=lambda device: getattr(self.current, "stream", self.stream(TRAINING, device)),
            stream=self.use,
            Event=self.event,
        ))  # fmt: skip
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.record_stream(tensor, stream))

    def stream(self, name: str, device: torch.device) -> Any:
        return SimpleNamespace(
            name=name, device=device, wait_event=lambda event: self.log.append(("wait", name, event.name))
        )

    def event(self) -> Any:
        event = SimpleNamespace(name="")

        def record(stream: Any) -> None:
            event.name = f"{stream.name}#{sum(entry[:2] == ('record', stream.name) for entry in self.log)}"
            self.log.append(("record", stream.name, event.name))

        event.record = record
        return event

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        self.current.stream = stream
        yield
        del self.current.stream

    def record_stream(self, tensor: Tensor, stream: Any) -> None:
        self.recorded.setdefault(tensor.data_ptr(), set()).add(stream.name)


def test_the_streams_meet_where_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    device.install(monkeypatch)
    monkeypatch.setattr(reading, "at_hand", lambda tensor: False)
    inner = background.factorise

    def factorise(structure: Any, layers: Any, factors: Any, damping: Any) -> Any:
        assert threading.current_thread().name == THREAD
        device.log.append(("factorise", device.current.stream.name))
        handed = {tensor.data_ptr() for some in factors for tensor in some[:2]}
        assert all(SIDE in device.recorded[pointer] for pointer in handed)
        assert not handed & {layer.factors.A.data_ptr() for layer in layers}, "a copy, which no step writes into"
        values, retries = inner(structure, layers, factors, damping)
        made.extend(tensor.data_ptr() for value in values for tensor in value.values())
        return values, retries

    made: list[int] = []
    monkeypatch.setattr(background, "factorise", factorise)
    torch.manual_seed(0)
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, max_staleness=2, inverse_every=3, seed=0)
    for step in range(6):
        device.log.append(("step", str(step)))
        train_step(model, optimizer, *vectors(6, 4, 3))
    log = [entry for entry in device.log if entry[0] != "step"]
    assert log == [
        ("record", TRAINING, "training#0"),
        ("wait", SIDE, "training#0"),
        ("factorise", SIDE),
        ("record", SIDE, "side#0"),
        ("wait", TRAINING, "side#0"),
    ]
    steps = [index for index, entry in enumerate(device.log) if entry[0] == "step"]
    assert steps[3] < device.log.index(log[0]) < steps[4]
    assert device.log.index(log[-1]) > steps[5]
    assert made
    assert all(TRAINING in device.recorded[pointer] for pointer in made)


def test_streams_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for streams in (False, True):
        with monkeypatch.context() as patch:
            if streams:
                Device().install(patch)
            torch.manual_seed(0)
            model = mlp(4, 5, 3)
            optimizer = KFAC(model, 0.1, max_staleness=1, inverse_every=2, seed=0)
            for _ in range(7):
                train_step(model, optimizer, *vectors(6, 4, 3))
            optimizer.state_dict()
            runs.append(snapshot(model))
    assert equal(*runs)


def test_an_error_beside_the_training_surfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    Device().install(monkeypatch)
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, max_staleness=1, inverse_every=2, seed=0)
    for _ in range(2):
        train_step(model, optimizer, *vectors(6, 4, 3))

    def failing(*_: Any) -> Any:
        raise ArithmeticError("spoilt")

    monkeypatch.setattr(background, "factorise", failing)
    train_step(model, optimizer, *vectors(6, 4, 3))
    with pytest.raises(RuntimeError, match="inverses asked for at step 2 could not be made in the background"):
        train_step(model, optimizer, *vectors(6, 4, 3))
    train_step(model, optimizer, *vectors(6, 4, 3))
    assert optimizer.steps == 4
