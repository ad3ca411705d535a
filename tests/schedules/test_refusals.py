"""Options out of range, and loops that would leave out examples or lose the learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kronfac.schedules import AdaptiveBatch, BatchSchedule, FixedBatch, GrowBatch, LinearScaling
from tests.schedules.runs import sgd, walk

GIVEN: dict[Any, dict[str, Any]] = {
    FixedBatch: {"examples": 10, "batch_size": 2, "epochs": 4},
    LinearScaling: {"examples": 10, "batch_size": 4, "epochs": 6},
    GrowBatch: {"examples": 10, "batch_size": 2, "max_batch_size": 8, "epochs": 4},
    AdaptiveBatch: {"examples": 10, "batch_size": 2, "max_batch_size": 8, "epochs": 4, "eigenvalue": lambda: 1.0},
}

REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (FixedBatch, {"examples": 0}, ValueError, "examples: expected an integer >= 1, got 0"),
    (FixedBatch, {"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
    (FixedBatch, {"batch_size": 11}, ValueError, "batch_size: expected at most the number of examples, 10, got 11"),
    (FixedBatch, {"batch_size": 2.0}, TypeError, "batch_size: expected an integer"),
    (FixedBatch, {"small_batch": 0}, ValueError, "small_batch: expected an integer >= 1"),
    (FixedBatch, {"epochs": 0}, ValueError, "epochs: expected an integer >= 1"),
    (FixedBatch, {"decay_epochs": (3, 1)}, ValueError, "decay_epochs: expected ascending epochs from 1 to 3"),
    (FixedBatch, {"decay_epochs": (1, 1)}, ValueError, "decay_epochs: expected ascending"),
    (FixedBatch, {"decay_epochs": (4,)}, ValueError, "decay_epochs: expected ascending epochs from 1 to 3"),
    (FixedBatch, {"decay_epochs": 2}, TypeError, "decay_epochs: expected a list"),
    (FixedBatch, {"decay": 1.0}, ValueError, "decay: expected a number > 0 and < 1"),
    (FixedBatch, {"decay": 1e-310}, ValueError, "decay: expected a factor whose inverse is finite"),
    (FixedBatch, {"seed": -1}, ValueError, "seed: expected an integer >= 0"),
    (LinearScaling, {"base_batch_size": 0}, ValueError, "base_batch_size: expected an integer >= 1"),
    (LinearScaling, {"warmup_epochs": 7}, ValueError, "warmup_epochs: expected at most epochs=6"),
    (LinearScaling, {"warmup_epochs": -1}, ValueError, "warmup_epochs: expected a number >= 0"),
    (GrowBatch, {"max_batch_size": 1}, ValueError, "max_batch_size: expected batch_size=2 to the number of"),
    (GrowBatch, {"max_batch_size": 11}, ValueError, "max_batch_size: expected batch_size=2 to the number of"),
    (AdaptiveBatch, {"eigenvalue": 3.0}, TypeError, "eigenvalue: expected a callable, got float"),
    (AdaptiveBatch, {"adversarial": "fgsm"}, TypeError, "adversarial: expected a callable, got str"),
    (AdaptiveBatch, {"adversarial_share": 0.0}, ValueError, "adversarial_share: expected a number > 0 and <= 1"),
    (AdaptiveBatch, {"growth": 1}, ValueError, "growth: expected an integer >= 2"),
    (AdaptiveBatch, {"threshold": 1.0}, ValueError, "threshold: expected a number > 1"),
    (AdaptiveBatch, {"duration": 0}, ValueError, "duration: expected an integer >= 1"),
    (AdaptiveBatch, {"every": 0}, ValueError, "every: expected an integer >= 1"),
]


@pytest.mark.parametrize(("kind", "changed", "error", "message"), REFUSED)
def test_options(kind: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = sgd(0.1)
    with pytest.raises(error, match=f"{kind.__name__}: {message}"):
        kind(optimizer, **{**GIVEN[kind], **changed})
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("kind", list(GIVEN))
def test_no_optimizer(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got list"):
        kind([], **GIVEN[kind])


def fixed() -> BatchSchedule:
    return FixedBatch(sgd(0.1), **GIVEN[FixedBatch])


def test_an_epoch_that_was_not_gone_through() -> None:
    schedule = fixed()
    with pytest.raises(RuntimeError, match="10 of 10 examples of epoch 0 were not handed out"):
        schedule.end_epoch()
    for _ in schedule.steps():
        break
    with pytest.raises(RuntimeError, match="8 of 10 examples of epoch 0 were not handed out"):
        schedule.end_epoch()
    assert [step.number for step in schedule.steps()] == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match=r"epoch 0 is over; call end_epoch\(\) first"):
        schedule.steps()
    schedule.end_epoch()


def test_after_the_end() -> None:
    schedule = fixed()
    walk(schedule)
    assert schedule.finished
    assert list(schedule.batch_sampler) == []
    for call in (schedule.steps, schedule.end_epoch):
        with pytest.raises(RuntimeError, match="all 4 epochs are over"):
            call()


def test_a_loop_beside_another() -> None:
    schedule = fixed()
    first = schedule.steps()
    next(first)
    second = schedule.steps()
    assert next(second).number == 1
    with pytest.raises(RuntimeError, match=r"other steps\(\) were begun"):
        next(first)
    assert next(second).number == 2
    schedule.load_state_dict(fixed().state_dict())
    with pytest.raises(RuntimeError, match="the state was changed"):
        next(second)
    assert len(list(schedule.steps())) == 5


def test_a_rate_that_something_else_changed() -> None:
    optimizer = sgd(0.1, 0.2)
    schedule = FixedBatch(optimizer, **GIVEN[FixedBatch])
    steps = schedule.steps()
    next(steps)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5).step()
    with pytest.raises(RuntimeError, match=r"lr of param group 0 was set to 0.1 and is now 0.05; leave the learning"):
        next(steps)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(RuntimeError, match="expected 2 param groups, got 3"):
        next(schedule.steps())


def test_a_loader_of_something_else() -> None:
    schedule, data = fixed(), TensorDataset(torch.arange(10))
    with pytest.raises(TypeError, match=r"loader: expected a torch\.utils\.data\.DataLoader, got list"):
        schedule.steps([])  # type: ignore[arg-type]
    for loader in (DataLoader(data, batch_size=2), DataLoader(data, batch_sampler=fixed().batch_sampler)):
        with pytest.raises(ValueError, match=r"loader: make it with batch_sampler=schedule.batch_sampler"):
            schedule.steps(loader)


def test_parts_of_a_loader_that_were_not_read() -> None:
    schedule = FixedBatch(sgd(), examples=10, batch_size=4, small_batch=2, epochs=1)
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_sampler=schedule.batch_sampler)
    steps = schedule.steps(loader)
    next(iter(next(steps).parts))
    with pytest.raises(RuntimeError, match="1 of 2 parts of a step were not read"):
        next(steps)
