"""Second moments of the gradients of single examples, by torch.func, without any of kronfac's own statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vjp, vmap

from kronfac.curvature import LayerAdapter, Likelihood


def output_gradients(
    likelihood: Likelihood, logits: Tensor, fisher: str, *, seed: int = 0, draws: int = 1, mask: Tensor | None = None
) -> list[tuple[Tensor, float]]:
    """d(-log p)/d logits as a recorder of that Fisher type makes them, each with its weight."""
    logits = logits.detach()
    if fisher == "exact":
        return [(column, 1.0) for column in likelihood.exact_gradients(logits, mask)]
    generator = Generator().manual_seed(seed)
    return [(likelihood.sample_gradients(logits, generator, mask), 1 / draws) for _ in range(draws)]


def matrices(net: nn.Module, adapter: LayerAdapter, x: Tensor, vector: Tensor) -> Tensor:
    """Σ over the outputs of `vector` times their derivatives, per example: (N, *adapter.matrix_shape).

    Args:
        net: treats the examples of a batch one by one.
        adapter: of the layer; only the place of each parameter in its matrix is taken from it.
        x: (N, ...).
        vector: shaped like the output.
    """
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    names = [name for name, p in net.named_parameters() if any(p is q for q in adapter.parameters())]

    def one(example: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        def forward(some: dict[str, Tensor]) -> Tensor:
            out: Tensor = functional_call(net, {**parameters, **some}, (example.unsqueeze(0),))
            return out

        _, pullback = vjp(forward, {name: parameters[name] for name in names})
        result: dict[str, Tensor] = pullback(gradient.unsqueeze(0))[0]
        return result

    each = vmap(one)(x, vector)
    own = dict(net.named_parameters())
    result = []
    for index in range(len(x)):
        for name in names:
            own[name].grad = each[name][index]
        result.append(adapter.gradient().clone())
    for name in names:
        own[name].grad = None
    return torch.stack(result)


def mean_squares(
    net: nn.Module,
    adapter: LayerAdapter,
    x: Tensor,
    vectors: Iterable[tuple[Tensor, float]],
    terms: float,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """(1/M) Σ (leftᵀ (gradient of an example) right)², squared elementwise."""
    total = torch.zeros(())
    for vector, weight in vectors:
        some = matrices(net, adapter, x, vector)
        if left is not None and right is not None:
            some = left.mT @ some @ right
        total = total + weight * some.square().sum(0)
    return total / terms
