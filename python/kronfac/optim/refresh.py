"""From fresh statistics to preconditioned gradients; nothing is committed here, so that a step can be called off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kronfac.curvature import GradientRows, ScaledSums
from kronfac.curvature.clock import timed
from kronfac.curvature.statistics import diagonal
from kronfac.optim import reading
from kronfac.optim.chains import average_links
from kronfac.optim.layers import Layer
from kronfac.optim.ranks import Flag
from kronfac.optim.structures import Averages, Factorisation, Kind, Structures
from kronfac.optim.structures.tridiagonal import apply_chains

_T = TypeVar("_T")
_SMALL = 4096  # elements; the passes over smaller tensors cost less together than the calls
_FEW = 256  # elements; to read fewer costs less than any operator


@dataclass(frozen=True)
class Average:
    """A layer's running averages after one more update.

    Attributes:
        factors: the new averages.
        updates: how many statistics are in them.
    """

    factors: Averages
    updates: int


@dataclass(frozen=True)
class Preconditioned:
    """The preconditioned gradients of several layers.

    Attributes:
        matrices: P per layer, shaped like its gradient matrix.
        dots: ⟨P, V⟩ of the layers of one kind of block, dtype and device, with the positions of these layers, in
            ascending order.
    """

    matrices: list[Tensor]
    dots: list[tuple[list[int], Tensor]]


@timed("statistics")
def average(layers: Sequence[Layer], fresh: Mapping[str, ScaledSums], factor_decay: float) -> dict[str, Average]:
    """Running averages with decay min(1 - 1/k, factor_decay), k counting the layer's updates: no bias from the start.

    Args:
        layers: the covered layers; none of them is changed.
        fresh: the statistics of some of them, by name; their memory becomes that of the new averages.
        factor_decay: the decay that is reached in the long run.

    Returns:
        The new averages of the layers in `fresh`, and of layers that share something with one of them.
    """
    if not fresh:
        return {}
    shared = average_links(layers, fresh, factor_decay)  # before the sums are taken over
    result = {}
    for layer in layers:
        if layer.name not in fresh:
            continue
        new, updates = fresh[layer.name], layer.updates + 1
        decay = layer.decay(factor_decay)
        A = new.A_sum.to(layer.dtype).mul_((1 - decay) * new.A_scale)
        G = new.G_sum.to(layer.dtype).mul_((1 - decay) * new.G_scale)
        before: Mapping[str, Tensor] = {}
        if layer.factors is not None:
            A.add_(layer.factors.A, alpha=decay)
            G.add_(layer.factors.G, alpha=decay)
            before = layer.factors.extra
        extra = dict(before)
        for key, (total, scale) in new.extra.items():
            if layer.name in shared and key in shared[layer.name]:
                continue
            started = key in before
            extra[key] = total.to(layer.dtype).mul_(((1 - decay) if started else 1.0) * scale)
            if started:
                extra[key].add_(before[key], alpha=decay)
        result[layer.name] = Average(Averages(A, G, extra), updates)
    for layer in layers:
        if layer.name in shared:
            newest = result[layer.name].factors if layer.name in result else layer.factors
            assert newest is not None
            updates = layer.updates + (layer.name in result)
            result[layer.name] = Average(newest._replace(extra={**newest.extra, **shared[layer.name]}), updates)
    return result


def carry(
    structure: Structures, layers: Sequence[Layer], factors: Sequence[Averages], inverses: Mapping[str, Factorisation]
) -> dict[str, Averages]:
    """The averages of layers with further statistics in terms of the factorisations that replace theirs, by name."""
    result = {}
    for layer, some in zip(layers, factors, strict=True):
        if layer.statistics and layer.name in inverses:
            own = structure.by_block[layer.block]
            result[layer.name] = some._replace(extra=own.carry(some, layer.factorisation, inverses[layer.name]))
    return result


@timed("factorise")
def factorise(
    structure: Structures, layers: Sequence[Layer], factors: Sequence[Averages], damping: Sequence[float]
) -> tuple[list[Factorisation | None], int]:
    """Factorise several layers, one call per kind of block, dtype and device; returns (factorisations, retries)."""
    values: list[Factorisation | None] = [None] * len(layers)
    retried = 0
    for chosen in _buckets((layer.block, layer.adapter.input_shape, layer.dtype, layer.device) for layer in layers):
        own = structure.of(layers[chosen[0]].adapter)
        done = own.factorise([factors[i] for i in chosen], [damping[i] for i in chosen])
        for index, value in zip(chosen, done.values, strict=True):
            values[index] = value
        retried += done.retried
    return values, retried


@timed("precondition")
def precondition(
    structure: Structures,
    blocks: Sequence[Kind],
    grads: Sequence[Callable[[], Tensor]],
    factorisations: Sequence[Factorisation],
    damping: Sequence[float],
    rows: Sequence[GradientRows | None],
    following: Sequence[int | None] = (),
) -> Preconditioned:
    """Precondition several layers, one call per kind of block, dtype and device, or per layer whose rows are at hand.

    The layers of chains are one call of their own.

    Args:
        structure: how factors are applied.
        blocks: what the Fisher block of each layer is made of.
        grads: make V of each layer.
        factorisations: of each layer.
        damping: of each layer.
        rows: that may form V of a layer; tested here.
        following: the position of each layer's successor in a chain, or nothing.
    """
    matrices: dict[int, Tensor] = {}
    dots: list[tuple[list[int], Tensor]] = []
    rest: list[int] = []
    for index, (some, factorisation) in enumerate(zip(rows, factorisations, strict=True)):
        own = structure.by_block[blocks[index]]
        if some is not None and own.by_rows and some.form():
            matrices[index], dot = own.apply_rows(some, factorisation)
            dots.append(([index], dot.reshape(1)))
        else:
            rest.append(index)
    values = [grads[index]() for index in rest]
    # In float16 a preconditioned gradient overflows where its scaled-down update would not.
    values = [value.float() if value.dtype == torch.float16 else value for value in values]
    joined = {i for pair in enumerate(following) if pair[1] is not None for i in pair}
    keys = [
        (blocks[index], index in joined, value.dtype, value.device) for index, value in zip(rest, values, strict=True)
    ]
    for chosen in _buckets(keys):
        layers = [rest[i] for i in chosen]
        gradients, inverses = [values[i] for i in chosen], [factorisations[i] for i in layers]
        if layers[0] in joined:
            places = {layer: place for place, layer in enumerate(layers)}
            out, products = apply_chains(gradients, inverses, [_place(places, following[i]) for i in layers])
        else:
            out, products = structure.by_block[blocks[layers[0]]].apply(
                gradients, inverses, [damping[i] for i in layers]
            )
        for index, matrix in zip(layers, out, strict=True):
            matrices[index] = matrix
        dots.append((layers, products))
    return Preconditioned([matrices[index] for index in range(len(grads))], dots)


def is_finite(tensor: Tensor) -> Flag:
    """Whether all entries of a real tensor are finite, without waiting for an accelerator."""
    if not reading.at_hand(tensor):
        return tensor.isfinite().all()
    # There isfinite is five passes by as many kernels. An extreme value is NaN or infinite as soon as one entry is.
    return all(map(math.isfinite, tensor.tolist() if tensor.numel() <= _FEW else map(float, tensor.aminmax())))


def all_finite(tensors: Iterable[Tensor]) -> list[Flag]:
    """Whether all entries are finite: one verdict per dtype and device, without host synchronisation."""
    full = [
        torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        for tensor in tensors
        if tensor.numel()
    ]
    flags: list[Flag] = []
    for chosen in _buckets((tensor.dtype, tensor.device) for tensor in full):
        some = [full[i] for i in chosen]
        if reading.at_hand(some[0]):
            # The infinity norm is not vectorised there: it takes ten times as long as the extremes.
            small = [tensor.flatten() for tensor in some if tensor.numel() <= _SMALL]
            large = [tensor for tensor in some if tensor.numel() > _SMALL]
            joined = [torch.cat(small)] if small else []
            flags += map(is_finite, [*joined, *large])
        else:
            norms = torch._foreach_norm(some, float("inf"))  # one fused pass over many tensors
            flags.append(is_finite(torch.stack(list(norms))))
    return flags


@timed("statistics")
def sums_finite(fresh: Iterable[ScaledSums]) -> list[Flag]:
    """Whether fresh statistics are finite: one verdict per dtype and device, without host synchronisation."""
    # A non-finite entry of a row reaches the diagonal, a sum of squares, of its second moment; it is all that is read.
    fresh = list(fresh)
    diagonals = [diagonal(factor) for sums in fresh for factor in (sums.A_sum, sums.G_sum)]
    buckets = _buckets((some.dtype, some.device) for some in diagonals)
    flags = [is_finite(torch.cat([diagonals[i] for i in chosen])) for chosen in buckets]
    return flags + all_finite(total for sums in fresh for total, _ in sums.extra.values())


def _place(places: Mapping[int, int], following: int | None) -> int | None:
    """Where a successor is in its bucket; None also for one that has come into another, of another dtype or device."""
    return None if following is None else places.get(following)


def _buckets(keys: Iterable[_T]) -> list[list[int]]:
    """Positions grouped by equal key, in order of first appearance."""
    groups: dict[_T, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())
