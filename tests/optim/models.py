"""Small models and helpers that several tests of the optimizer share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC


def mlp(*sizes: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))
        if index < len(sizes) - 2:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def convnet(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, dtype=dtype),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, (2, 3), stride=2, bias=False, dtype=dtype),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 3 * 2, 5, dtype=dtype),
    )


def images(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 6, 6, dtype=dtype), torch.randint(5, (count,))


def vectors(count: int, inputs: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, inputs, dtype=dtype), torch.randint(classes, (count,))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def frozen_state(optimizer: KFAC) -> Any:
    """A deep copy of the checkpoint, for comparisons."""
    return tree_map(lambda tensor: tensor.clone(), optimizer.state_dict())


def tree_map(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: tree_map(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tree_map(function, item) for item in value]
    return value


def same_tree(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same_tree(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_tree(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
