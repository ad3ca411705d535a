"""One run: from the initial weights to the end of its schedule, through as many interruptions as it takes."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.clock import Clock
from bench.large_batch import problem
from bench.large_batch.problem import Data
from bench.large_batch.settings import ADAPTIVE, Plan, Setting
from kronfac import schedules
from kronfac._archives import load_archive
from kronfac._files import replace_file


class _Timed:
    """An eigenvalue computation whose time is measured."""

    def __init__(self, search: Callable[[], Any], clock: Clock) -> None:
        self._search, self._clock = search, clock

    def __call__(self) -> Any:
        with self._clock.running():
            return self._search()


def make_schedule(
    setting: Setting, plan: Plan, data: Data, network: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock
) -> schedules.BatchSchedule:
    """The schedule of a method.

    Args:
        setting: method, batch and seed.
        plan: the rest.
        data: for the eigenvalue and the attack.
        network: likewise.
        optimizer: whose rate is the base rate.
        clock: of the eigenvalue computations.
    """
    common: dict[str, Any] = {
        "examples": len(data.inputs),
        "epochs": plan.epochs,
        "decay_epochs": plan.decay_epochs,
        "decay": plan.decay,
        "small_batch": plan.small_batch,
        "seed": setting.seed,
    }
    if setting.method == "bl":
        return schedules.FixedBatch(optimizer, batch_size=setting.batch, **common)
    if setting.method == "fb":
        return schedules.LinearScaling(
            optimizer,
            batch_size=setting.batch,
            base_batch_size=plan.base_batch,
            warmup_epochs=plan.warmup_epochs,
            **common,
        )
    common |= {"batch_size": plan.base_batch, "max_batch_size": setting.batch}
    if setting.method == "gg":
        return schedules.GrowBatch(optimizer, **common)
    assert setting.method in ADAPTIVE
    return schedules.AdaptiveBatch(
        optimizer,
        eigenvalue=_Timed(problem.eigenvalue(network, plan, data), clock),
        duration=plan.duration,
        adversarial=problem.attack(plan, data) if setting.method == "absa" else None,
        adversarial_share=plan.share,
        **common,
    )


class _Run:
    """A run under way; all of it lies in its checkpoint."""

    def __init__(self, setting: Setting, plan: Plan, data: Data, checkpoint: Path) -> None:
        self._setting, self._plan, self._data, self._checkpoint = setting, plan, data, checkpoint
        saved: dict[str, Any] | None = load_archive(checkpoint) if checkpoint.exists() else None
        self.clock = Clock(**saved["clock"]) if saved else Clock()
        self.eigen_clock = Clock(**saved["eigen_clock"]) if saved else Clock()
        self.network = problem.make_network(setting.seed)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay
        )
        self.schedule = make_schedule(setting, plan, data, self.network, self.optimizer, self.eigen_clock)
        self.diverged, self.segments = False, 1
        self._losses: list[float] = []  # mean training loss of each epoch
        self._sum = 0.0  # of the losses of this epoch's examples
        if saved is not None:
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self._losses, self._sum, self.segments = saved["losses"], saved["sum"], saved["segments"] + 1
        self.saved_at = time.monotonic()

    def advance(self, pause: Callable[[], bool]) -> bool:
        """Train to the end of the epoch, or until `pause` says so between two steps; False after that."""
        with self.clock.running():
            for step in self.schedule.steps():
                self._step(step)
                if self.diverged or pause():
                    return False
            self.schedule.end_epoch()
        self._losses.append(self._sum / len(self._data.inputs))
        self._sum = 0.0
        return True

    def _step(self, step: schedules.Step) -> None:
        self.optimizer.zero_grad()
        total = 0.0
        for part in step.parts:
            x, y = self._data.inputs[part.indices], self._data.targets[part.indices]
            x = self._perturbed(x, y, part)
            loss = part.weight * problem.loss_of(self.network(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if math.isfinite(total):
            self.optimizer.step()
            self._sum += total * step.examples
        else:
            self.diverged = True

    def _perturbed(self, x: Tensor, y: Tensor, part: schedules.Part) -> Tensor:
        return self.schedule.adversarial(self.network, problem.loss_of, x, y, part)

    def save(self) -> None:
        content = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "clock": self.clock.state(),
            "eigen_clock": self.eigen_clock.state(),
            "losses": self._losses,
            "sum": self._sum,
            "segments": self.segments,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        replace_file(self._checkpoint, buffer.getvalue())
        self.saved_at = time.monotonic()

    def record(self) -> dict[str, Any]:
        """What is kept of the run, which is over."""
        began = time.perf_counter()
        self.diverged = self.diverged or not problem.is_finite(self.network, self._data)
        measured = problem.measure(self.network, self._plan, self._data, attacked=not self.diverged)
        return {
            **self._setting.to_json(),
            "plan": self._plan.to_json(),
            "status": "diverged" if self.diverged else "finished",
            "updates": self.schedule.updates,
            "seconds": self.clock.wall,
            "cpu_seconds": self.clock.cpu,
            "waited_seconds": self.clock.waited,
            "eigen_seconds": self.eigen_clock.wall,
            "measuring_seconds": time.perf_counter() - began,
            "segments": self.segments,
            "losses": self._losses,
            "log": self.schedule.log,
            **measured,
        }


def run(
    setting: Setting,
    plan: Plan,
    data: Data,
    checkpoint: Path,
    stop: Callable[[], bool] = lambda: False,
    every: float = 20.0,
) -> dict[str, Any] | None:
    """Make a run, or go on with it where its checkpoint left it. Going on is bit for bit, only the times differ.

    Args:
        setting: method, batch and seed.
        plan: the rest.
        data: examples.
        checkpoint: written now and then and when stopped, read when it is there.
        stop: asked after every step.
        every: seconds between checkpoints.

    Returns:
        The record of the finished run, None where `stop` said so.

    Raises:
        DamagedError: the checkpoint cannot be read.
        ValueError: a checkpoint of something else.
    """
    going = _Run(setting, plan, data, checkpoint)
    stopping = False

    def pause() -> bool:
        nonlocal stopping
        stopping = stopping or stop()
        return stopping or time.monotonic() - going.saved_at >= every

    while not going.schedule.finished and not going.diverged:
        going.advance(pause)
        if not going.diverged and (stopping or time.monotonic() - going.saved_at >= every):
            going.save()
        if stopping and not going.diverged:
            return None
    return going.record()
