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
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bench.autoencoder import methods
from bench.autoencoder.clock import Clock
from bench.autoencoder.problem import Order, error_of, loss_of, make_network
from bench.autoencoder.settings import WIDTHS, Setting

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


def _average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int, weight: float) -> None:
    # Short at first, so that the initial weights are soon forgotten.
    torch._foreach_lerp_(averaged, current, max(weight, 1 / (float(count) + 1)))


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

    def modules(self) -> dict[str, nn.Module]:
        return {"raw": self.network, "averaged": self.average.module}


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
    saved: dict[str, Any] | None = None
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        plan = saved["plan"]
    else:
        methods.make(job.setting, make_network(job.seed, job.widths), job.seed)  # refuses before time is spent
        began = time.perf_counter()
        per_step = None if job.steps is not None else calibrate(job, images)
        steps = job.steps if per_step is None else max(1, int(PLANNED_SHARE * job.seconds / per_step))
        plan = {"steps": steps, "step_seconds": per_step, "calibration_seconds": time.perf_counter() - began}
    steps = plan["steps"]
    session, clock, number, segments = _Session(job, images, steps), Clock(), 0, 1
    curve: list[dict[str, float]] = []
    losses_end: float | None = None
    if saved is not None:
        session.network.load_state_dict(saved["network"])
        session.average.load_state_dict(saved["average"])
        session.optimizer.load_state_dict(saved["optimizer"])
        clock, number, segments = Clock(**saved["clock"]), saved["step"], saved["segments"] + 1
        curve, losses_end = saved["curve"], saved["loss"]
    marks = {round(share * steps) for share in (*EARLY, *((i + 1) / job.evaluations for i in range(job.evaluations)))}

    def save() -> None:
        content = {
            "plan": plan,
            "network": session.network.state_dict(),
            "average": session.average.state_dict(),
            "optimizer": session.optimizer.state_dict(),
            "clock": clock.state(),
            "step": number,
            "segments": segments,
            "curve": curve,
            "loss": losses_end,
        }
        temporary = checkpoint.with_name(f".{checkpoint.name}.tmp")
        torch.save(content, temporary)
        os.replace(temporary, checkpoint)

    def evaluate() -> None:
        if curve and curve[-1]["step"] == number:
            return
        errors = {name: error_of(module, images) for name, module in session.modules().items()}
        curve.append({"step": number, "seconds": clock.wall, **errors})

    status, saved_at = "finished", clock.wall
    while True:
        if number in marks:
            evaluate()
        if number >= steps or clock.wall >= job.seconds:
            break
        stopping = stop()
        if stopping or clock.wall - saved_at >= job.checkpoint_every:
            save()
            saved_at = clock.wall
        if stopping:
            return None
        with clock.running():
            losses_end = session.step(number)
        number += 1
        if not math.isfinite(losses_end):
            status = "diverged"
            break
    if status == "finished":
        evaluate()
    return {
        "setting": job.setting.to_json(),
        "seed": job.seed,
        "status": status,
        "steps": number,
        "planned_steps": steps,
        "cut_short": status == "finished" and number < steps,
        "calibrated_step_seconds": plan["step_seconds"],
        "calibration_seconds": plan["calibration_seconds"],
        "seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "waited_seconds": clock.waited,
        "segments": segments,
        "last_loss": losses_end if losses_end is not None and math.isfinite(losses_end) else None,
        "skipped_steps": getattr(session.optimizer, "skipped_steps", 0),
        "curve": curve,
    }
