"""The training loop that `kronfac train` and `kronfac demo` share, and the evaluation after an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.cli.errors import UsageError
from kronfac.cli.problems import Loader, LossFunction, count_examples, to_device


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training was.

    Attributes:
        loss: mean of the batch losses, weighted by examples; NaN or infinite as soon as one batch's is.
        updates: optimizer steps taken.
        propagations: examples of which a gradient was taken, each time it was.
        batch_size: examples per update, the most in this epoch.
        seconds: that the steps took, loading included.
        lr: learning rate of the first param group at the last step; None where there is none.
    """

    loss: float
    updates: int
    propagations: int
    batch_size: int
    seconds: float
    lr: float | None = None


def train_epoch(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Loader,
    optimizer: torch.optim.Optimizer,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Epoch:
    """Go through the batches once.

    Args:
        model: trained in place, in training mode.
        loss_fn: averaged over the batch.
        batches: (inputs, targets) pairs.
        optimizer: steps once per batch.
        on_step: called with the batch's loss after every step (for progress bars; its time is not counted).

    Returns:
        The epoch, cut short as soon as a batch's loss is not finite.
    """
    model.train()
    device = next(model.parameters()).device
    total, examples, steps, largest, seconds = 0.0, 0, 0, 0, 0.0
    start = time.perf_counter()
    for inputs, targets in batches:
        inputs, targets = to_device(inputs, device), to_device(targets, device)
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = loss.item()
        count = count_examples(targets)
        total += value * count
        examples += count
        largest = max(largest, count)
        steps += 1
        seconds += time.perf_counter() - start
        on_step(value)
        if not abs(value) < float("inf"):
            return Epoch(value, steps, examples, largest, seconds, current_lr(optimizer))
        start = time.perf_counter()
    if examples == 0:
        raise UsageError("the training loader yields no batch")
    return Epoch(total / examples, steps, examples, largest, seconds, current_lr(optimizer))


def current_lr(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of the first param group, None where there is none."""
    lr = optimizer.param_groups[0].get("lr")
    return None if lr is None else float(lr)


@torch.no_grad()
def evaluate(model: nn.Module, loss_fn: LossFunction, batches: Loader) -> tuple[float, float | None]:
    """Mean loss and accuracy over all examples, in evaluation mode; the model's mode is restored.

    Accuracy is None unless the outputs are (N, classes) and the targets (N,) integers.
    """
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        total, correct, examples = 0.0, 0, 0
        classified = True
        for inputs, targets in batches:
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            outputs = model(inputs)
            count = count_examples(targets)
            total += loss_fn(outputs, targets).item() * count
            examples += count
            hits = _hits(outputs, targets)
            classified = classified and hits is not None
            correct += hits or 0
    finally:
        model.train(was_training)
    if examples == 0:
        raise UsageError("a loader yields no batch")
    return total / examples, correct / examples if classified else None


def _hits(outputs: Any, targets: Any) -> int | None:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
        return None
    return int((outputs.argmax(dim=1) == targets).sum())
