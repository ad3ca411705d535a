"""The schedules of `kronfac train`, one entry each: the class, and which options it takes with which defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from kronfac.cli.errors import UsageError, one_line
from kronfac.cli.problems import Problem

if TYPE_CHECKING:
    from kronfac.schedules import BatchSchedule

Data: TypeAlias = "tuple[Tensor, Tensor]"
Build: TypeAlias = "Callable[[dict[str, Any], dict[str, Any], Problem, Data], BatchSchedule]"


@dataclass(frozen=True)
class Entry:
    """A schedule.

    Attributes:
        summary: one line, for the help.
        options: the options that it takes with their defaults; all others are refused.
        build: builds it from a value for every option, the arguments that all schedules share, the problem and its
            examples.
    """

    summary: str
    options: Mapping[str, Any]
    build: Build


def _plainly(name: str) -> Build:
    def build(options: dict[str, Any], shared: dict[str, Any], problem: Problem, data: Data) -> BatchSchedule:
        from kronfac import schedules

        kind: Callable[..., BatchSchedule] = getattr(schedules, name)
        return kind(**shared, **options)

    return build


def _growing(options: dict[str, Any], shared: dict[str, Any], problem: Problem, data: Data) -> BatchSchedule:
    from kronfac.schedules import GrowBatch

    return GrowBatch(**shared, **_with_largest(options, shared))


def _adaptive(options: dict[str, Any], shared: dict[str, Any], problem: Problem, data: Data) -> BatchSchedule:
    from kronfac.schedules import AdaptiveBatch, top_eigenvalue

    options = _with_largest(options, shared)
    blocks = options.pop("eigenvalue_blocks")
    eigenvalue = top_eigenvalue(
        problem.model,
        problem.loss_fn,
        data,
        examples=min(options.pop("eigenvalue_examples"), shared["examples"]),
        blocks=None if blocks == "none" else blocks,
        tolerance=options.pop("eigenvalue_tolerance"),
        products=options.pop("eigenvalue_products"),
        chunk_size=shared["small_batch"],
        seed=shared["seed"],
    )
    epsilon = options.pop("adversarial")
    attack = None
    if epsilon is not None:
        from kronfac.adversarial import fgsm

        # The range of all inputs, and not of those that happen to be in the batch.
        attack = partial(fgsm, eps=epsilon, bounds=_range(data[0]))
    return AdaptiveBatch(
        **shared, eigenvalue=eigenvalue, every=options.pop("eigenvalue_every"), adversarial=attack, **options
    )


def _with_largest(options: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    if options["max_batch_size"] is None:
        options["max_batch_size"] = min(_LARGEST * shared["batch_size"], shared["examples"])
    return options


def _range(inputs: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(inputs)
    return float(low), float(high)


_LARGEST = 16
_SHARED = {"decay_epochs": [], "decay": 0.2, "small_batch": None}

SCHEDULES: dict[str, Entry] = {
    "fixed": Entry("one batch size", _SHARED, _plainly("FixedBatch")),
    "linear-scaling": Entry(
        "the rate in proportion to the batch, after a warm-up",
        {**_SHARED, "base_batch_size": 128, "warmup_epochs": 5.0},
        _plainly("LinearScaling"),
    ),
    "grow-batch": Entry(
        "at each decay epoch a larger batch instead of a smaller rate", {**_SHARED, "max_batch_size": None}, _growing
    ),
    "adaptive-batch": Entry(
        "batch and rate grow when the top Hessian eigenvalue has fallen",
        {
            **_SHARED,
            "max_batch_size": None,
            "growth": 2,
            "threshold": 2.0,
            "duration": 10,
            "adversarial": None,
            "adversarial_share": 0.2,
            "eigenvalue_examples": 512,
            "eigenvalue_every": 1,
            "eigenvalue_blocks": "none",
            "eigenvalue_tolerance": 0.1,
            "eigenvalue_products": 50,
        },
        _adaptive,
    ),
}


def is_scheduled(config: Mapping[str, Any]) -> bool:
    """Whether batches come from a schedule, and not as the problem's own loader gives them."""
    return config["schedule"] != "fixed" or bool(config["decay_epochs"]) or config["small_batch"] is not None


def make_schedule(
    config: Mapping[str, Any], optimizer: torch.optim.Optimizer, problem: Problem, data: Data
) -> BatchSchedule:
    """Build the schedule.

    Args:
        config: of the run, with a value for every option of the schedule.
        optimizer: whose learning rates it sets.
        problem: what is trained.
        data: its training examples, inputs and targets.

    Raises:
        UsageError: an option that the schedule refuses.
    """
    entry = SCHEDULES[config["schedule"]]
    shared = {
        "optimizer": optimizer,
        "examples": len(data[1]),
        "batch_size": config["batch_size"],
        "epochs": config["epochs"],
        "seed": config["seed"],
    }
    shared |= {name: config[name] for name in _SHARED}
    options = {name: config[name] for name in entry.options if name not in _SHARED}
    try:
        return entry.build(options, shared, problem, data)
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from None
