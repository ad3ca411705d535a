"""Kronecker factors of any layer that is affine in its parameters, from dense Jacobians of single examples.

Nothing here knows patches, groups or indices: what a layer sees at a position is read off the Jacobian of its output
with respect to its parameters, and what it is told off the Jacobian of the model's output with respect to the layer's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kronfac.curvature import KroneckerFactors, LayerAdapter

Rows = tuple[Tensor, Tensor]


class OneLayer(nn.Module):
    """A layer, a nonlinearity and a head that mixes all positions of an example."""

    def __init__(self, layer: nn.Module, features: int, channels_last: bool = True) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 3)
        self.channels_last = channels_last

    def after(self, y: Tensor) -> Tensor:
        """The logits as a function of the layer's output."""
        return self.head(torch.tanh(y).flatten(1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3)."""
        return self.after(self.layer(x))


def rows_of(model: OneLayer, adapter: LayerAdapter, example: Tensor, axis: int) -> Rows:
    """Rows a (groups, R, in) of one example, and J (outputs, groups, R, out) = d logits / d s.

    Args:
        model: float64.
        adapter: of its layer; only the place of each parameter in its matrix is taken from it.
        example: (1, ...).
        axis: of the layer's output that holds its features.
    """
    layer = model.layer
    names = [name for name, p in layer.named_parameters() if any(p is q for q in adapter.parameters())]
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    chosen = {name: parameters[name] for name in names}

    def output(some: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(layer, {**parameters, **some}, (example,))
        return y.movedim(axis, -1).flatten(0, -2)  # (R, all outputs)

    y = output(chosen)
    jacobian = torch.cat([part.reshape(*y.shape, -1) for part in jacrev(output)(chosen).values()], -1)
    start = 0
    for name in names:
        parameter = dict(layer.named_parameters())[name]
        parameter.grad = torch.arange(start, start + parameter.numel(), dtype=parameter.dtype).view_as(parameter)
        start += parameter.numel()
    places = adapter.gradient().long()
    for name in names:
        dict(layer.named_parameters())[name].grad = None
    places = places if places.dim() == 3 else places.unsqueeze(0)
    groups, outputs, _ = places.shape
    per_group = jacobian.view(len(y), groups, outputs, -1)
    a = torch.stack([per_group[:, group, 0, places[group, 0]] for group in range(groups)])
    rest = per_group.clone()
    for group in range(groups):
        for row in range(outputs):  # every output sees the same row, and nothing but its own parameters
            assert torch.allclose(per_group[:, group, row, places[group, row]], a[group], atol=1e-12)
            rest[:, group, row, places[group, row]] = 0
    assert float(rest.abs().max()) < 1e-12

    raw = layer(example).detach()
    J = jacrev(model.after)(raw).movedim(1 + 1 + (axis % raw.dim()), -1)
    J = J.reshape(3, -1, groups, outputs).movedim(2, 1)
    return a.detach(), J.detach()


def oracle(
    model: OneLayer,
    adapter: LayerAdapter,
    x: Tensor,
    *,
    axis: int,
    sharing: str,
    terms: int,
    square: Callable[[Tensor, int], Tensor],
    keep: Tensor | None = None,
) -> KroneckerFactors:
    """Factors as algorithms.md defines them.

    Args:
        model: float64.
        adapter: of its layer.
        x: (N, ...).
        axis: see `rows_of`.
        sharing: "expand" or "reduce".
        terms: M.
        square: from logits (1, 3) and the example's number to E[d(-log p) d(-log p)ᵀ] (3, 3).
        keep: positions (N, R) that count.
    """
    A: Tensor | float = 0.0
    G: Tensor | float = 0.0
    R = N = 0
    for index in range(len(x)):
        example = x[index : index + 1]
        a, J = rows_of(model, adapter, example, axis)
        if keep is not None:
            a, J = a[:, keep[index]], J[:, :, keep[index]]
        S = square(model(example).detach(), index)
        if sharing == "reduce":
            if not a.shape[1]:
                continue
            a, J = a.mean(1, keepdim=True), J.sum(2, keepdim=True)
        A = A + torch.einsum("gri,grj->gij", a, a)
        G = G + torch.einsum("cgro,cd,dgrp->gop", J, S, J)
        R += a.shape[1]
        N += 1
    scales = (terms, R) if sharing == "expand" else (N, terms)
    A, G = torch.as_tensor(A) / scales[0], torch.as_tensor(G) / scales[1]
    return KroneckerFactors(A, G) if len(G) > 1 else KroneckerFactors(A[0], G[0])
