"""From fresh statistics to preconditioned gradients; nothing is committed here, so that a step can be called off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kronfac.curvature import KroneckerFactors
from kronfac.optim.layers import Layer
from kronfac.optim.structures import Factorisation, Structure

_T = TypeVar("_T")


@dataclass(frozen=True)
class Average:
    """A layer's running averages after one more update.

    Attributes:
        factors: the new averages.
        updates: how many statistics are in them.
    """

    factors: KroneckerFactors
    updates: int


@dataclass(frozen=True)
class Preconditioned:
    """The preconditioned gradients of several layers.

    Attributes:
        matrices: P per layer (out, in[+1]).
        dots: ⟨P, V⟩ per layer, 0-dimensional, on the layer's device.
    """

    matrices: list[Tensor]
    dots: list[Tensor]


def average(layers: Sequence[Layer], fresh: Mapping[str, KroneckerFactors], factor_decay: float) -> dict[str, Average]:
    """Running averages with decay min(1 - 1/k, factor_decay), k counting the layer's updates: no bias from the start.

    Args:
        layers: the covered layers; none of them is changed.
        fresh: the statistics of some of them, by name.
        factor_decay: the decay that is reached in the long run.

    Returns:
        The new averages of the layers in `fresh`.
    """
    result = {}
    for layer in layers:
        if layer.name not in fresh:
            continue
        new = KroneckerFactors(*(factor.to(layer.dtype) for factor in (fresh[layer.name].A, fresh[layer.name].G)))
        updates = layer.updates + 1
        if layer.factors is not None:
            decay = min(1 - 1 / updates, factor_decay)
            new = KroneckerFactors(new.A.lerp(layer.factors.A, decay), new.G.lerp(layer.factors.G, decay))
        result[layer.name] = Average(new, updates)
    return result


def factorise(
    structure: Structure, layers: Sequence[Layer], factors: Sequence[KroneckerFactors], damping: Sequence[float]
) -> tuple[list[Factorisation | None], int]:
    """Factorise several layers, one call per dtype and device; returns (factorisations, retries)."""
    values: list[Factorisation | None] = [None] * len(layers)
    retried = 0
    for chosen in _buckets((layer.dtype, layer.device) for layer in layers):
        done = structure.factorise([factors[i] for i in chosen], [damping[i] for i in chosen])
        for index, value in zip(chosen, done.values, strict=True):
            values[index] = value
        retried += done.retried
    return values, retried


def precondition(
    structure: Structure, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
) -> Preconditioned:
    """Precondition several layers, one call per dtype and device."""
    # In float16 a preconditioned gradient overflows where its scaled-down update would not.
    grads = [grad.float() if grad.dtype == torch.float16 else grad for grad in grads]
    matrices, dots = list(grads), list(grads)
    for chosen in _buckets((grad.dtype, grad.device) for grad in grads):
        out, products = structure.apply(
            [grads[i] for i in chosen], [factorisations[i] for i in chosen], [damping[i] for i in chosen]
        )
        for index, matrix, product in zip(chosen, out, products.unbind(), strict=True):
            matrices[index], dots[index] = matrix, product
    return Preconditioned(matrices, dots)


def all_finite(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Whether all entries are finite: one bool tensor () per dtype and device, without host synchronisation."""
    full = [tensor for tensor in tensors if tensor.numel()]
    flags = []
    for chosen in _buckets((tensor.dtype, tensor.device) for tensor in full):
        # The largest magnitude is NaN or infinite as soon as one entry is; one fused pass over many tensors.
        norms = torch._foreach_norm([full[i] for i in chosen], float("inf"))
        flags.append(torch.stack(list(norms)).isfinite().all())
    return flags


def _buckets(keys: Iterable[_T]) -> list[list[int]]:
    """Positions grouped by equal key, in order of first appearance."""
    groups: dict[_T, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())
