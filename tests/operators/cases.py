"""Small models with data and loss, and dense oracles made with torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.func import hessian as func_hessian
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Tensor
    targets: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        targets = self.targets.to(dtype) if self.targets.is_floating_point() else self.targets
        return Case(self.name, self.model.to(dtype), self.loss_fn, self.inputs.to(dtype), targets)


class Attention(nn.Module):
    """Fused attention over a few tokens, then a linear head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(x)).unflatten(-1, (3, 2, 2)).transpose(1, 3).unbind(2)
        return self.head(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).mean(1))


def _mlp() -> Case:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return Case("mlp", model, functional.cross_entropy, torch.randn(11, 5), torch.randint(0, 3, (11,)))


def _regression() -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2))
    return Case("regression", model, functional.mse_loss, torch.randn(9, 4), torch.randn(9, 2))


def _convnet() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2, stride=2, groups=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2, 3),
    )
    return Case("convnet", model, functional.cross_entropy, torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8,)))


def _batchnorm() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(3 * 9, 2),
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(3))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.rand(3) + 0.5)  # type: ignore[union-attr]
    return Case("batchnorm", model, functional.cross_entropy, torch.randn(7, 2, 3, 3), torch.randint(0, 2, (7,)))


def _attention() -> Case:
    return Case("attention", Attention(), functional.cross_entropy, torch.randn(6, 5, 4), torch.randint(0, 3, (6,)))


CASES = {"mlp": _mlp, "regression": _regression, "convnet": _convnet, "batchnorm": _batchnorm, "attention": _attention}


def make_case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(17)
    return CASES[name]().to(dtype)


def _flat_function(
    model: nn.Module, inputs: Any, names: Sequence[str] | None
) -> tuple[Callable[[Tensor], Any], Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    chosen = list(parameters) if names is None else list(names)

    def run(vector: Tensor) -> Any:
        sizes = [parameters[name].numel() for name in chosen]
        parts = [part.view_as(parameters[name]) for part, name in zip(vector.split(sizes), chosen, strict=True)]
        return functional_call(model, {**parameters, **dict(zip(chosen, parts, strict=True))}, (inputs,))

    return run, torch.cat([parameters[name].reshape(-1) for name in chosen])


def dense_hessian(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str] | None = None,
) -> Tensor:
    """The Hessian by torch.func, forward over reverse, in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    run, start = _flat_function(model, inputs, names)
    with sdpa_kernel(SDPBackend.MATH):
        result = func_hessian(lambda vector: loss_fn(run(vector), targets))(start)
    for module, mode in modes:
        module.training = mode
    return result


def difference_hessian(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> Tensor:
    """The Hessian by central differences of the gradient, in eval mode: good to about 1e-8 in float64.

    For layers that torch.func cannot differentiate twice: weight_norm has no forward mode, and torch 2.13 gets the
    second derivative with respect to a LayerNorm's scale wrong (its "Hessian" is not symmetric).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parameters = list(model.parameters())

    def gradient() -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_fn(model(inputs), targets), parameters)])

    columns = []
    for parameter in parameters:
        flat = parameter.detach().view(-1)
        for entry in range(len(flat)):
            start = flat[entry].clone()
            flat[entry] = start + 1e-5
            above = gradient()
            flat[entry] = start - 1e-5
            columns.append((above - gradient()) / 2e-5)
            flat[entry] = start
    for module, mode in modes:
        module.training = mode
    return torch.stack(columns, dim=1)


def dense_ggn(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    names: Sequence[str] | None = None,
) -> Tensor:
    """JᵀHJ by torch.func with J and H written out, in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    run, start = _flat_function(model, inputs, names)
    with sdpa_kernel(SDPBackend.MATH):
        output = run(start)
        jacobian = jacrev(lambda vector: run(vector).reshape(-1))(start)
        curvature = func_hessian(lambda flat: loss_fn(flat.view_as(output), targets))(output.reshape(-1))
    for module, mode in modes:
        module.training = mode
    return jacobian.mT @ curvature @ jacobian


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected entry."""
    scale = float(expected.abs().max())
    return float((actual.double() - expected.double()).abs().max()) / (scale if scale > 0 else 1.0)
