"""K-FAC steps beside SGD steps, in mixed precision, by events on the GPU's own clock."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac.cli.bench.measure import quartiles
from kronfac.cli.bench.networks import resnet50
from kronfac.cli.bench.steps import LEARNING_RATE, Schedule, check_finite, cycle_times, summarise
from kronfac.cli.errors import RunError

WARM_UP, PERIODS = 21, 3
BAR = 1.15
"""Most that a K-FAC step may take, in SGD steps."""


SCHEDULE = Schedule(factor_every=10, inverse_every=100)


@dataclass(frozen=True)
class Configuration:
    """One comparison: a classifier of images, cross-entropy, bfloat16 autocast.

    Attributes:
        memory_format: of images and weights.
        max_staleness: of KFAC.
        network, shape, classes: what is trained, on what; shape is (batch, channels, height, width).
        schedule: of the curvature.
    """

    memory_format: torch.memory_format = torch.contiguous_format
    max_staleness: int = 0
    network: Callable[[], nn.Module] = resnet50
    shape: tuple[int, int, int, int] = (64, 3, 224, 224)
    classes: int = 1000
    schedule: Schedule = SCHEDULE

    @property
    def name(self) -> str:
        """What the table calls it."""
        layout = "NHWC" if self.memory_format == torch.channels_last else "NCHW"
        stale = f", max_staleness={self.max_staleness}" if self.max_staleness else ""
        return (
            f"{self.network.__name__}, {'x'.join(map(str, self.shape))} {layout}, bf16 autocast, factors/inverses "
            f"every {self.schedule}{stale}"
        )


CONFIGURATIONS = (
    Configuration(),
    Configuration(torch.channels_last),
    Configuration(torch.channels_last, max_staleness=20),
)


class Side:
    """A model and its optimizer, with an event behind each step."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, schedule: Schedule
    ) -> None:
        self.model, self.optimizer, self.images, self.labels = model, optimizer, images, labels
        self.schedule, self.steps = schedule, 0
        self.records: list[tuple[str, dict[str, float]]] = []

    def step(self) -> None:
        """As anybody trains in mixed precision."""
        self.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1

    def run(self, count: int, record: bool) -> None:
        """Train; nothing waits for the device until the last step is queued."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        first = self.steps
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        torch.cuda.synchronize()
        for number, (start, end) in enumerate(pairwise(events)):
            if record:
                self.records.append((self.schedule.kind(first + number), {"step": start.elapsed_time(end) * 1e-3}))

    def check(self) -> None:
        """Raise RunError where what was timed was not training."""
        check_finite(self.model)
        skipped = getattr(self.optimizer, "skipped_steps", 0)
        if skipped:
            raise RunError(f"{skipped} steps were skipped for non-finite values; no times to report")


def measure_steps(configuration: Configuration) -> dict[str, Any]:
    """Whole periods of the schedule by turns, SGD and KFAC, after `WARM_UP` steps of each."""
    torch.manual_seed(0)
    schedule = configuration.schedule
    network = configuration.network().to(memory_format=configuration.memory_format)
    images = torch.randn(configuration.shape).to(memory_format=configuration.memory_format)
    labels = torch.randint(configuration.classes, configuration.shape[:1])
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9),
        "kronfac": lambda model: kronfac.KFAC(
            model,
            lr=LEARNING_RATE,
            factor_every=schedule.factor_every,
            inverse_every=schedule.inverse_every,
            max_staleness=configuration.max_staleness,
            seed=0,
        ),
    }
    sides: dict[str, Side] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norms train as SGD, here as for any user
        for name, make in makers.items():
            model = copy.deepcopy(network)
            sides[name] = Side(model, make(model), images, labels, schedule)
        for side in sides.values():
            side.run(WARM_UP, record=False)
        for _ in range(PERIODS):
            for side in sides.values():
                side.run(schedule.inverse_every, record=True)
    for side in sides.values():
        side.check()
    records = {name: side.records for name, side in sides.items()}
    records["sgd"] = [("plain", phases) for _, phases in records["sgd"]]  # it knows no kinds: all its steps are alike
    base = statistics.median(phases["step"] for _, phases in records["sgd"])
    cycles = {name: cycle_times(found, schedule.inverse_every) for name, found in records.items()}
    ratios = [ours / rival for ours, rival in zip(cycles["kronfac"], cycles["sgd"], strict=True)]
    return {
        "case": configuration.name,
        "bar": BAR,
        "sgd_median": base,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": list(quartiles(ratios)),
        "periods": PERIODS,
        "peak_memory": torch.cuda.max_memory_allocated(),
        "sides": {
            name: summarise(found, {"plain": 1.0} if name == "sgd" else schedule.shares(), base)
            for name, found in records.items()
        },
    }
