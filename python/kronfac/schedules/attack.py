"""Perturbing a part of a batch in the middle of a training step, without a trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

LossFunction: TypeAlias = "Callable[[Any, Any], Tensor]"
Attack: TypeAlias = "Callable[[nn.Module, LossFunction, Tensor, Tensor], Tensor]"
"""Called as attack(model, loss_fn, x, y); returns the perturbed x."""


def perturbed(
    attack: Attack, model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, count: int, caller: str
) -> Tensor:
    """Return x with its first `count` examples perturbed, detached.

    The model is in eval mode during the attack, so that running statistics stay those of clean examples; afterwards
    modes and gradients of the parameters are as before.

    Raises:
        TypeError: x or y is no tensor, or the attack returns none.
        ValueError: fewer examples than `count`, or the attack returns another shape, type or device.
    """
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim == 0 or len(tensor) < count:
            raise ValueError(f"{caller}: {name}: expected {count} examples or more, got shape {tuple(tensor.shape)}")
    clean = x[:count].detach()
    with _unharmed(model):
        found = attack(model, loss_fn, clean.clone(), y[:count])
    if not isinstance(found, Tensor):
        raise TypeError(f"{caller}: expected the attack to return a tensor, got {type(found).__name__}")
    if (found.shape, found.dtype, found.device) != (clean.shape, clean.dtype, clean.device):
        raise ValueError(
            f"{caller}: expected the attack to return a {clean.dtype} tensor of shape {tuple(clean.shape)} on "
            f"{clean.device}, got {found.dtype}, {tuple(found.shape)}, {found.device}"
        )
    return torch.cat([found.detach(), x[count:]])


@contextmanager
def _unharmed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards modes and `.grad` are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None  # a backward() of the attack would add to what the step has so far
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
