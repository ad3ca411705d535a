"""What a framework's loop did to a model, repeated as a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

Call = tuple[tuple[Any, ...], dict[str, Any]]
Step = Callable[[nn.Module, Sequence[Call]], None]


def recorded_calls(model: nn.Module) -> list[Call]:
    """A list to which each training forward of the model will add its arguments."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            calls.append(tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (args, dict(kwargs))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two equal models; each with the hooks of its own."""
    model = make()
    return model, copy.deepcopy(model)


def same_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Equality bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.detach(), b.detach()) for a, b in pairs)


def chunks(calls: Sequence[Call], size: int) -> list[Sequence[Call]]:
    """The calls of each step."""
    return [calls[start : start + size] for start in range(0, len(calls), size)]
