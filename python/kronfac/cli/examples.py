"""The training examples one by one, for what picks them itself: schedules and Newton-type optimizers."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.cli.errors import UsageError
from kronfac.cli.problems import Problem
from kronfac.datasets import Batches


def single_examples(problem: Problem, what: str) -> tuple[Tensor, Tensor]:
    """The training examples, inputs and targets, on the model's device.

    Args:
        problem: whose data are known one by one.
        what: that asks for them, for the error.

    Raises:
        UsageError: only a loader is known, or data that are not tensors of one shape.
    """
    data, device = problem.train, next(problem.model.parameters()).device
    if isinstance(data, Batches):
        return data.split.inputs.to(device), data.split.targets.to(device)
    remedy = "return the training data as one batch (inputs, targets) of tensors, or a list of such batches"
    if not isinstance(data, list | tuple):
        raise UsageError(f"{what} picks its own examples, and {problem.name} brings a loader; {remedy}")
    if not data:
        raise UsageError("the training loader yields no batch")
    for batch in data:
        pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)
        if not pair or batch[0].ndim == 0 or batch[1].ndim == 0 or len(batch[0]) != len(batch[1]):
            raise UsageError(f"{what} picks its own examples, which {problem.name}'s batches are not made of; {remedy}")
    inputs, targets = ([batch[part] for batch in data] for part in (0, 1))
    if any(len({tensor.shape[1:] for tensor in side}) > 1 for side in (inputs, targets)):
        raise UsageError(f"{what} picks its own examples, and those of {problem.name} differ in shape")
    return torch.cat(inputs).to(device), torch.cat(targets).to(device)
