"""Chains of layers: which layers follow each other, and their joint part in a step (structure="tridiagonal")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from kronfac.curvature import ScaledSums
from kronfac.curvature.chain import CrossGradients, CrossInputs, chainable
from kronfac.optim.layers import Layer
from kronfac.optim.structures import Averages, Factorisation
from kronfac.optim.structures.tridiagonal import CROSS, LINKED, Pair, link


def form_chains(layers: Sequence[Layer]) -> None:
    """Give each layer its successor and the statistics that they share.

    Candidates are neighbours in the order of ``model.named_modules()``, both Linear with dense A, of one dtype, device
    and sharing. Whether they are called one after the other shows in every forward anew, see `CrossStatistic`.

    Args:
        layers: of a new division of parameters; changed in place. What a layer has taken over from an earlier division
            is kept where its successor is still the same.
    """
    for layer, following in pairwise(layers):
        if not (chainable(layer.adapter) and chainable(following.adapter)):
            continue
        if (layer.dtype, layer.device) != (following.dtype, following.device):
            continue
        layer.following = following.name
        statistics = CrossInputs(layer.adapter, following.adapter), CrossGradients(layer.adapter, following.adapter)
        layer.statistics = {**layer.statistics, **dict(zip(CROSS, statistics, strict=True))}
    for layer in layers:
        if layer.followed != layer.following:
            layer.followed = layer.following
            if layer.factors is not None:
                extra = {key: value for key, value in layer.factors.extra.items() if key not in CROSS}
                if layer.following is not None:
                    # Of the past nothing is known: with zeros the joint averages stay what variables can have.
                    like = layer.factors.A
                    extra |= {key: like.new_zeros(layer.statistics[key].shape) for key in CROSS}
                layer.factors = layer.factors._replace(extra=extra)
            if layer.factorisation is not None:
                layer.factorisation = {key: some for key, some in layer.factorisation.items() if key not in LINKED}


def average_links(
    layers: Sequence[Layer], fresh: Mapping[str, ScaledSums], factor_decay: float
) -> dict[str, dict[str, Tensor]]:
    """Running averages of what neighbours share, C ← √(d_i d_j) C + √((1 - d_i)(1 - d_j)) C_new.

    d is the decay of each layer, 1 for one without fresh statistics. Layers that were updated equally often have equal
    decays, and this is the usual average; otherwise it is the one that A and G of the two, and C, can have together.

    Args:
        layers: the covered layers; none of them is changed.
        fresh: statistics of some of them, by name; left alone.
        factor_decay: the decay that is reached in the long run.

    Returns:
        The new averages by layer name and by the names in `CROSS`, of the layers for which they change.
    """
    decays = {layer.name: layer.decay(factor_decay) for layer in layers if layer.name in fresh}
    result: dict[str, dict[str, Tensor]] = {}
    for layer in layers:
        if layer.following is None or not {layer.name, layer.following} & decays.keys():
            continue
        own, other = decays.get(layer.name, 1.0), decays.get(layer.following, 1.0)
        old = {} if layer.factors is None else layer.factors.extra
        new = fresh[layer.name].extra if layer.name in fresh else {}
        averages = {}
        for key in CROSS:
            terms = []
            if key in old:
                terms.append(old[key] * math.sqrt(own * other))
            if key in new:
                total, scale = new[key]
                terms.append(total.to(layer.dtype) * (scale * math.sqrt((1 - own) * (1 - other))))
            if terms:
                averages[key] = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
        if averages:
            result[layer.name] = averages
    return result


def link_shapes(layer: Layer, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors named `LINKED` of a layer; empty where it has no successor."""
    if layer.following is None:
        return {}
    (inputs, outputs), (next_inputs, next_outputs) = (
        some.adapter.factor_sizes for some in (layer, layers[layer.following])
    )
    shapes = ((outputs, outputs), (inputs, inputs), (outputs, inputs), (inputs, next_inputs), (outputs, next_outputs))
    return dict(zip(LINKED, shapes, strict=True))


def link_layers(
    due: Sequence[Layer],
    layers: Sequence[Layer],
    newest: Mapping[str, Averages],
    inverses: Mapping[str, Factorisation],
    damping: Sequence[float],
) -> int:
    """Add what couples a layer to its successor to the new inverses.

    Args:
        due: layers whose inverses are renewed.
        layers: all of them.
        newest: averages by layer name.
        inverses: new ones by layer name; extended in place.
        damping: λ of each layer in `due`.

    Returns:
        How many pairs were left out because nothing positive definite remained.
    """
    known = {layer.name: layer for layer in layers}
    names: list[str] = []
    pairs: list[Pair] = []
    for layer, amount in zip(due, damping, strict=True):
        if layer.following is None or layer.name not in inverses:
            continue
        factors, other = newest[layer.name], inverses.get(layer.following, known[layer.following].factorisation)
        if other is None or any(key not in factors.extra for key in CROSS):
            continue  # the successor has no statistics yet
        names.append(layer.name)
        pairs.append(Pair(factors, other, amount))
    done: dict[str, Factorisation | None] = {}
    for kind in {(pair.factors.A.dtype, pair.factors.A.device): None for pair in pairs}:
        chosen = [i for i, pair in enumerate(pairs) if (pair.factors.A.dtype, pair.factors.A.device) == kind]
        done.update(zip((names[i] for i in chosen), link([pairs[i] for i in chosen]), strict=True))
    for name, value in done.items():
        inverses[name].update(value or {})
    return sum(value is None for value in done.values())


def successors(layers: Sequence[Layer]) -> list[int | None]:
    """The position of each layer's successor among the layers of a step, None where that takes no part in it."""
    places = {layer.name: place for place, layer in enumerate(layers)}
    return [None if layer.following is None else places.get(layer.following) for layer in layers]
