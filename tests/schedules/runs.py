"""Networks, training loops and walks through schedules that several tests share."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.schedules import AdaptiveBatch, BatchSchedule


def sgd(*lrs: float, momentum: float = 0.0) -> torch.optim.SGD:
    """An optimizer with one group per rate."""
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs or (0.1,)]
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum)


def walk(schedule: BatchSchedule) -> list[dict[str, Any]]:
    """Go through all epochs without training; the log."""
    while not schedule.finished:
        for _ in schedule.steps():
            pass
        schedule.end_epoch()
    return schedule.log


def column(schedule: BatchSchedule, name: str) -> list[Any]:
    return [row[name] for row in schedule.log]


def scripted(values: Iterable[Any]) -> Any:
    """An eigenvalue function that returns these in turn."""
    iterator: Iterator[Any] = iter(values)
    return lambda: next(iterator)


def adaptive(optimizer: torch.optim.Optimizer, values: Sequence[Any], **options: Any) -> AdaptiveBatch:
    """ABS with a script of eigenvalues, by default over 64 examples in batches of 4 to 32."""
    arguments = {"examples": 64, "batch_size": 4, "max_batch_size": 32, "epochs": len(values) + 1, **options}
    return AdaptiveBatch(optimizer, eigenvalue=scripted(values), **arguments)


def digits(count: int = 200) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data[:count] / 16.0, dtype=torch.float32), torch.tensor(data.target[:count])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 10))


def train(
    schedule: BatchSchedule,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    stop: int | None = None,
) -> None:
    """Train to the end, or until `stop` updates were made, which may be in the middle of an epoch."""
    inputs, targets = data
    while not schedule.finished:
        for step in schedule.steps():
            optimizer.zero_grad()
            for part in step.parts:
                x, y = inputs[part.indices], targets[part.indices]
                x = schedule.adversarial(model, functional.cross_entropy, x, y, part)
                (part.weight * functional.cross_entropy(model(x), y)).backward()
            optimizer.step()
            if schedule.updates == stop:
                return
        schedule.end_epoch()


def saved(value: Any) -> Any:
    """What a file brings back."""
    file = io.BytesIO()
    torch.save(copy.deepcopy(value), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
