"""Closures for the tests of Newton-type optimizers, and the dense matrices that torch.func says belong to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Closure = Callable[["Tensor | None"], Any]
ROSENBROCK, BEALE = "rosenbrock", "beale"


def classifier(*sizes: int, examples: int = 40, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A tanh network in float64 with labels that a teacher of the same shape gave."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    x = torch.randn(examples, sizes[0], dtype=torch.float64)
    y = (x @ torch.randn(sizes[0], sizes[-1], dtype=torch.float64)).argmax(dim=1)
    return model, x, y


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Closure:
    def closure(indices: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs, labels = (x, y) if indices is None else (x[indices], y[indices])
        outputs = model(inputs)
        return functional.cross_entropy(outputs, labels), outputs

    return closure


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(functional.cross_entropy(model(x), y), model.parameters())]
    )


def _as_function(model: nn.Module) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """The outputs as a function of the flat parameters and the inputs."""
    named = dict(model.named_parameters())

    def outputs(vector: Tensor, x: Tensor) -> Tensor:
        parts, first = {}, 0
        for name, p in named.items():
            parts[name] = vector[first : first + p.numel()].view(p.shape)
            first += p.numel()
        return functional_call(model, parts, (x,))

    return outputs, flat(model)


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    outputs, vector = _as_function(model)
    return hessian(lambda v: functional.cross_entropy(outputs(v, x), y))(vector)


def dense_ggn(model: nn.Module, x: Tensor) -> Tensor:
    """(1/N) Σ Jᵀ (diag(p) - ppᵀ) J, which is the Fisher matrix of the softmax as well."""
    outputs, vector = _as_function(model)
    jacobian = jacrev(outputs)(vector, x)
    p = functional.softmax(outputs(vector, x), dim=1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nia,nij,njb->ab", jacobian, middle, jacobian) / len(x)


def function_closure(name: str, point: Tensor) -> Closure:
    """A textbook function of two variables; both have their minimum 0."""

    def closure(indices: Tensor | None) -> Tensor:
        assert indices is None
        a, b = point
        if name == ROSENBROCK:
            return (1 - a) ** 2 + 100 * (b - a**2) ** 2
        return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2

    return closure


def broken_after(calls: int, closure: Closure, value: float = math.nan) -> Closure:
    """The closure, whose loss is not finite from a number of calls on."""
    made = 0

    def broken(indices: Tensor | None) -> Any:
        nonlocal made
        made += 1
        loss, outputs = closure(indices)
        return (loss if made <= calls else loss * value), outputs

    return broken


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries that a tensor made by an operator has had."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.entries = max(self.entries, leaf.numel())
        return result


def records(history: Sequence[Any], name: str) -> list[Any]:
    return [getattr(record, name) for record in history]
