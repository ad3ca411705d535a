"""One run: from the initial weights to the last step of its plan, through as many interruptions as it takes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from bench.autoencoder import methods
from bench.autoencoder.problem import Order, error_of, loss_of, make_network
from bench.autoencoder.settings import WIDTHS, Setting
from bench.clock import Clock

AVERAGED_IMAGES = 100_000
"""Horizon of the averaged iterate in training images: weight 0.99 at batch 1000 (Martens & Grosse, section 13)."""

CALIBRATION_SECONDS = 5.0
PLANNED_SHARE = 0.95
"""How much of its time a run is planned to fill, so that it ends with its last step and not with its time."""

EARLY = (0.0, 0.005, 0.01, 0.02)
"""Shares of the steps at which a curve has points besides its even ones."""


@dataclass(frozen=True)
class Job:
    """What to run and for how long.

    Attributes:
        setting: the method and its options.
        seconds: of training, evaluations not counted.
        evaluations: points of the curve, evenly over the steps, besides the early ones.
        seed: of the initial weights, of the order of the images and of K-FAC's sampler.
        widths: of the network.
        steps: the plan; None lets a calibration make it.
        checkpoint_every: seconds of training between checkpoints.
    """

    setting: Setting
    seconds: float
    evaluations: int
    seed: int = 0
    widths: Sequence[int] = WIDTHS
    steps: int | None = None
    checkpoint_every: float = 30.0


def _average(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int, weight: float) -> None:
    # Short at first, so that the initial weights are soon forgotten.
    torch._foreach_lerp_(list(averaged), list(current), max(weight, 1 / (float(count) + 1)))


class _Session:
    """Network, optimizer and average of a job, as they are after some number of steps."""

    def __init__(self, job: Job, images: Tensor, steps: int) -> None:
        self._images, self._order = images, Order(len(images), job.setting.batch, job.seed)
        self.network = make_network(job.seed, job.widths)
        weight = job.setting.batch / AVERAGED_IMAGES
        # Made before the optimizer: a copy of the network must not carry its hooks.
        self.average = AveragedModel(self.network, multi_avg_fn=lambda a, c, n: _average(a, c, n, weight))
        self.optimizer = methods.make(job.setting, self.network, job.seed)
        self._stepper = methods.Stepper(job.setting, self.optimizer, steps)

    def step(self, number: int) -> float:
        batch = self._images[self._order.at(number)]
        loss = self._stepper.step(number, lambda: loss_of(self.network(batch), batch))
        self.average.update_parameters(self.network)
        return loss


def check(job: Job, images: Tensor) -> None:
    """Raise ValueError where there are fewer images than one batch takes."""
    if job.setting.batch > len(images):
        raise ValueError(f"batch {job.setting.batch} is more than the {len(images)} images there are")


def calibrate(job: Job, images: Tensor) -> float:
    """Seconds per step, from whole periods of the method's refreshes after one that is not counted."""
    enough = min(CALIBRATION_SECONDS, job.seconds / 20)
    session, period, number, clock = _Session(job, images, 1 << 40), methods.period(job.setting), 0, Clock()
    for _ in range(period):
        session.step(number)
        number += 1
    while clock.wall < enough:
        with clock.running():
            for _ in range(period):
                session.step(number)
                number += 1
    return clock.wall / (number - period)


class _Run:
    """A job under way: its plan, its session, what was measured so far; all of that lies in its checkpoint."""

    def __init__(self, job: Job, images: Tensor, checkpoint: Path) -> None:
        self._job, self._images, self._checkpoint = job, images, checkpoint
        self.clock, self.number, self._segments = Clock(), 0, 1
        self._curve: list[dict[str, float]] = []
        self._loss = math.nan
        saved: dict[str, Any] | None = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
        self._plan: dict[str, Any] = _plan(job, images) if saved is None else saved["plan"]
        self.steps: int = self._plan["steps"]
        self._session = _Session(job, images, self.steps)
        if saved is not None:
            for name, part in self._parts().items():
                part.load_state_dict(saved[name])
            self.clock, self.number, self._segments = Clock(**saved["clock"]), saved["step"], saved["segments"] + 1
            self._curve, self._loss = saved["curve"], saved["loss"]
        self.saved_at = self.clock.wall
        even = ((index + 1) / job.evaluations for index in range(job.evaluations))
        self._marks = {round(share * self.steps) for share in (*EARLY, *even)}

    @property
    def diverged(self) -> bool:
        return self.number > 0 and not math.isfinite(self._loss)

    def step(self) -> None:
        with self.clock.running():
            self._loss = self._session.step(self.number)
        self.number += 1

    def evaluate_if_due(self) -> None:
        if self.number in self._marks:
            self._evaluate()

    def _evaluate(self) -> None:
        if self._curve and self._curve[-1]["step"] == self.number:
            return  # done before the checkpoint that this run went on from
        modules = {"raw": self._session.network, "averaged": self._session.average.module}
        errors = {name: error_of(module, self._images) for name, module in modules.items()}
        self._curve.append({"step": self.number, "seconds": self.clock.wall, **errors})

    def _parts(self) -> dict[str, Any]:
        return {
            "network": self._session.network,
            "average": self._session.average,
            "optimizer": self._session.optimizer,
        }

    def save(self) -> None:
        content = {name: part.state_dict() for name, part in self._parts().items()}
        content |= {
            "plan": self._plan,
            "clock": self.clock.state(),
            "step": self.number,
            "segments": self._segments,
            "curve": self._curve,
            "loss": self._loss,
        }
        temporary = self._checkpoint.with_name(f".{self._checkpoint.name}.tmp")
        torch.save(content, temporary)
        os.replace(temporary, self._checkpoint)
        self.saved_at = self.clock.wall

    def record(self) -> dict[str, Any]:
        """What is kept of the run, which is over."""
        if not self.diverged:
            self._evaluate()
        return {
            "setting": self._job.setting.to_json(),
            "seed": self._job.seed,
            "status": "diverged" if self.diverged else "finished",
            "steps": self.number,
            "planned_steps": self.steps,
            "cut_short": not self.diverged and self.number < self.steps,
            "calibrated_step_seconds": self._plan["step_seconds"],
            "calibration_seconds": self._plan["calibration_seconds"],
            "seconds": self.clock.wall,
            "cpu_seconds": self.clock.cpu,
            "waited_seconds": self.clock.waited,
            "segments": self._segments,
            "last_loss": self._loss if math.isfinite(self._loss) else None,
            "skipped_steps": getattr(self._session.optimizer, "skipped_steps", 0),
            "curve": self._curve,
        }


def _plan(job: Job, images: Tensor) -> dict[str, Any]:
    methods.make(job.setting, make_network(job.seed, job.widths), job.seed)  # refuses before time is spent
    if job.steps is not None:
        return {"steps": job.steps, "step_seconds": None, "calibration_seconds": 0.0}
    began = time.perf_counter()
    per_step = calibrate(job, images)
    steps = max(1, int(PLANNED_SHARE * job.seconds / per_step))
    return {"steps": steps, "step_seconds": per_step, "calibration_seconds": time.perf_counter() - began}


def run(job: Job, images: Tensor, checkpoint: Path, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """Run a job, or go on with it where its checkpoint left it.

    The clocks run from the taking of a batch to the end of its step, the averaged iterate included; evaluations,
    checkpoints and the calibration are outside. Going on is bit for bit, only the times differ.

    Args:
        job: what to run.
        images: (N, pixels), in [0, 1].
        checkpoint: written now and then and when stopped, read when it is there.
        stop: asked before every step.

    Returns:
        The record of the finished run, None where `stop` said so.

    Raises:
        methods.UnavailableError: the installed kronfac does not have the method.
        ValueError: a batch larger than the data.
    """
    check(job, images)
    going = _Run(job, images, checkpoint)
    while going.number < going.steps and going.clock.wall < job.seconds and not going.diverged:
        going.evaluate_if_due()
        stopping = stop()
        if stopping or going.clock.wall - going.saved_at >= job.checkpoint_every:
            going.save()
        if stopping:
            return None
        going.step()
    return going.record()
