"""From preconditioned gradients to the parameters: clips over all layers, directions by parameter, the update."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from kronfac.curvature.clock import timed
from kronfac.optim import reading
from kronfac.optim.groups import Groups, l2
from kronfac.optim.layers import Layer
from kronfac.optim.refresh import Preconditioned
from kronfac.optim.update import add_weight_decay, apply_update, kl_scales, norm_scales


def plain_gradient(parameter: Tensor, decay: float) -> Tensor:
    """The gradient of the loss with its L2 term, as SGD takes it."""
    assert parameter.grad is not None
    return parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad


def layer_gradient(layer: Layer, groups: Groups) -> Tensor:
    """The gradient matrix of a layer, with the L2 terms of its parameters."""
    gradient = layer.adapter.gradient()
    decays = [l2(groups[index]) for index in layer.groups]
    if not any(decays):
        return gradient
    return add_weight_decay(gradient, layer.adapter.weight_matrix(), decays, *layer.adapter.parts)


@timed("update")
def clip_scales(layers: Sequence[Layer], done: Preconditioned, groups: Groups) -> list[Tensor | None]:
    """The KL clip's factor per param group, for the layers that are the group's own; None where nothing is clipped."""
    result: list[Tensor | None] = [None] * len(groups)
    if all(group["kl_clip"] is None for group in groups):
        return result
    sets: dict[tuple[int, float], list[Tensor]] = {}
    for chosen, products in done.dots:
        if len(groups) == 1:
            sets.setdefault((0, float(groups[0]["lr"])), []).append(products)
            continue
        members: dict[tuple[int, float], list[int]] = {}
        for place, position in enumerate(chosen):
            own = layers[position].groups
            lr = max(float(groups[index]["lr"]) for index in own)
            members.setdefault((own[0], lr), []).append(place)
        for key, places in members.items():
            part = products if len(places) == len(chosen) else torch.stack([products[place] for place in places])
            sets.setdefault(key, []).append(part)
    keys = [key for key, sums in sets.items() for _ in sums]
    sums = [part for parts in sets.values() for part in parts]
    scales = kl_scales(sums, [lr for _, lr in keys], [groups[group]["kl_clip"] for group, _ in keys])
    for (group, _), scale in zip(keys, scales, strict=True):
        if scale is not None:
            result[group] = scale
    return result


def norm_constraint_scales(
    layers: Sequence[Layer], matrices: Sequence[Tensor], groups: Groups, scales: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The norm constraint's factor per param group, after the KL clip's; None where nothing is bounded."""
    result: list[Tensor | None] = [None] * len(groups)
    if all(group["norm_constraint"] is None for group in groups):
        return result
    sets: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
    for layer, matrix in zip(layers, matrices, strict=True):
        if groups[layer.groups[0]]["norm_constraint"] is not None:
            sets.setdefault((layer.groups[0], matrix.device, matrix.dtype), []).append(matrix)
    squares = []
    for (group, device, dtype), members in sets.items():
        wide = dtype if dtype == torch.float64 else torch.float32
        square = torch.stack(list(torch._foreach_norm(members, 2, dtype=wide))).square().sum()
        scale = scales[group]
        squares.append(square if scale is None else square * reading.brought(scale, device) ** 2)
    bounds = norm_scales(squares, [groups[group]["norm_constraint"] for group, _, _ in sets])
    for (group, _, _), bound in zip(sets, bounds, strict=True):
        result[group] = bound
    return result


def products(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Factor by factor, None standing for 1."""
    return [
        b if a is None else a if b is None else a * reading.brought(b, a.device, a.dtype)
        for a, b in zip(one, other, strict=True)
    ]


@timed("update")
def move(
    layers: Sequence[Layer],
    matrices: Sequence[Tensor],
    groups: Groups,
    state: MutableMapping[Tensor, dict[str, Tensor]],
    scales: Sequence[Tensor | None],
    good: Tensor | None = None,
) -> None:
    """Update all parameters: along the scaled preconditioned gradients where there are some, elsewhere as SGD.

    Nothing changes where `good`, a bool tensor (), is False.
    """
    found = directions(layers, matrices, groups, _clip(layers, matrices, scales))
    for group in groups:
        moving = [p for p in group["params"] if p.grad is not None]
        chosen = [found[id(p)] for p in moving]
        apply_update(group, moving, [tensor for tensor, _ in chosen], state, [scale for _, scale in chosen], good)


def directions(
    layers: Sequence[Layer], matrices: Sequence[Tensor], groups: Groups, scales: Sequence[Tensor | None]
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Direction of every parameter with a gradient and the factor that it has yet to be multiplied by, by its id."""
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    for layer, matrix, scale in zip(layers, matrices, scales, strict=True):
        parts = layer.adapter.split(matrix)
        if layer.adapter.slices is not None:
            _place(layer, parts, scale, groups, found)
            continue
        for parameter, part in zip(layer.parameters, parts, strict=True):
            found[id(parameter)] = part if part.dtype == parameter.dtype else part.to(parameter.dtype), scale
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and id(p) not in found:
                found[id(p)] = plain_gradient(p, l2(group)), None
    return found


def _place(
    layer: Layer,
    parts: Sequence[Tensor],
    scale: Tensor | None,
    groups: Groups,
    directions: MutableMapping[int, tuple[Tensor, Tensor | None]],
) -> None:
    """Put a layer that is a part of its parameters into their directions; parts without statistics move as SGD."""
    assert layer.adapter.slices is not None
    for parameter, index, part, place in zip(layer.parameters, layer.groups, parts, layer.adapter.slices, strict=False):
        if id(parameter) not in directions:
            directions[id(parameter)] = plain_gradient(parameter, l2(groups[index])).clone(), None
        directions[id(parameter)][0][place] = part if scale is None else part * scale


def _clip(layers: Sequence[Layer], matrices: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Apply the KL clip: the factor that each matrix has yet to be multiplied by, None where nothing is left to do.

    On the CPU multiplying waits until the momentum is added, which saves a pass over the matrices; on an accelerator
    one call for all matrices is worth more.
    """
    waiting: list[Tensor | None] = [None] * len(layers)
    at_once: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
    for position, (layer, matrix) in enumerate(zip(layers, matrices, strict=True)):
        scale = scales[layer.groups[0]]
        if scale is None:
            continue
        # A wider matrix is rounded to the parameter's type after scaling: before, float16 may overflow.
        at_hand = reading.at_hand(matrix) and reading.at_hand(scale)
        if at_hand and matrix.dtype == scale.dtype == layer.parameters[0].dtype:
            waiting[position] = scale
        else:
            at_once.setdefault((layer.groups[0], matrix.device, matrix.dtype), []).append(matrix)
    for (group, device, dtype), members in at_once.items():
        scale = scales[group]
        assert scale is not None
        # Of another dtype it would be one call for each matrix on an accelerator.
        torch._foreach_mul_(members, scale if reading.at_hand(scale) else reading.brought(scale, device, dtype))
    return waiting
