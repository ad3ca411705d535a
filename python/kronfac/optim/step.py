"""One step as a transaction: everything is computed first, and committed only when all of it is finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kronfac.curvature import GradientRows, ScaledSums
from kronfac.curvature.clock import timed
from kronfac.optim.background import Arrived, Background
from kronfac.optim.chains import link_layers, successors
from kronfac.optim.layers import Layer
from kronfac.optim.refresh import (
    Average,
    Preconditioned,
    all_finite,
    average,
    carry,
    factorise,
    precondition,
    sums_finite,
)
from kronfac.optim.structures import Averages, Factorisation, Structures
from kronfac.optim.update import add_weight_decay, apply_update, kl_scales, norm_scales

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What `advance` did.

    Attributes:
        applied: False when something was not finite; then nothing was changed.
        retries: factors that needed more damping than asked for.
        failures: layers that could not be inverted at all; they keep what they had.
        clip_scales: the KL clip's factor per param group, None where nothing was clipped.
        norm_scales: the norm constraint's factor per param group, None where there is none.
        bare: names of layers with gradients but no statistics so far; they were updated as SGD.
        cause: why the step was not applied, to be followed by "not finite"; "" where the reporter is to find out.
    """

    applied: bool
    retries: int = 0
    failures: int = 0
    clip_scales: list[Tensor | None] = field(default_factory=list)
    norm_scales: list[Tensor | None] = field(default_factory=list)
    bare: tuple[str, ...] = ()
    cause: str = ""


def advance(
    *,
    structure: Structures,
    layers: Sequence[Layer],
    groups: Groups,
    state: MutableMapping[Tensor, dict[str, Tensor]],
    fresh: Mapping[str, ScaledSums],
    factor_decay: float,
    step: int,
    found_inf: Tensor | None = None,
    rows: Mapping[str, GradientRows] | None = None,
    background: Background | None = None,
) -> Outcome:
    """Take one step: statistics into the averages, inverses when due, preconditioned gradients into the parameters.

    The host waits for the device once, to learn whether everything is finite, and once more when inverses are due.

    Args:
        structure: how factors are inverted and applied.
        layers: the covered layers; factors and factorisations are replaced.
        groups: checked param groups; the parameters are changed in place.
        state: momentum buffers.
        fresh: this step's statistics by layer name; may be empty. Their memory is taken over.
        factor_decay: long-run decay of the averages.
        step: 0-based number of this step.
        found_inf: GradScaler's verdict; anything but 0 skips the step.
        rows: by layer name, what may form the layer's gradient.
        background: makes inverses of layers that have one already for a later step; None makes all of them now.
    """
    home = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
    flags = sums_finite(fresh.values())
    if found_inf is not None:
        flags.append(found_inf.reshape(()) == 0)

    averages = average(layers, fresh, factor_decay)
    due = due_for_inverse(layers, averages, groups, step)
    arrived, later = Arrived(), list[Layer]()
    if background is not None:
        arrived = background.arrive(step)
        later = [layer for layer in due if layer.factorisation is not None]
        due = [layer for layer in due if layer.factorisation is None]
    if due:
        # Factorising waits for the device anyway, so the check comes first and spares it a hopeless attempt.
        if not agree(flags, home):
            return Outcome(applied=False)
        flags = []
    own = propose(structure, layers, groups, averages, due, partial(_damping, groups=groups), rows, arrived.values)
    ready, done = own.ready, own.done
    if not agree([*flags, *own.finite(groups)], home):
        return Outcome(applied=False)

    commit(layers, own, step, arrived.made)
    if background is not None:
        background.retire(step)
        snapshot = [layer.factors for layer in later if layer.factors is not None]
        background.submit(step, structure, later, snapshot, [_damping(layer, groups) for layer in later])
    scales = _clip_scales(ready, done, groups)
    bounds = _norm_scales(ready, done.matrices, groups, scales)
    _move(ready, done.matrices, groups, state, _products(scales, bounds))
    retries, failures = own.retries + arrived.retries, own.failures + arrived.failures
    return Outcome(True, retries, failures, scales, bounds, own.bare)


@dataclass(frozen=True)
class Proposal:
    """Inverses and preconditioned gradients that no layer holds yet.

    Attributes:
        factors: the newest running averages of every layer that has any, by layer name.
        updates: how many statistics are in those that are new, by layer name.
        inverses: the new ones, by layer name.
        retries: factors that needed more damping than asked for.
        failures: layers that could not be inverted at all.
        ready: the layers that can be preconditioned.
        done: their preconditioned gradients.
        bare: names of layers with gradients but no statistics so far.
    """

    factors: dict[str, Averages]
    updates: dict[str, int]
    inverses: dict[str, Factorisation]
    retries: int
    failures: int
    ready: list[Layer]
    done: Preconditioned
    bare: tuple[str, ...]

    def finite(self, groups: Groups) -> list[Tensor]:
        """Bool tensors () that are all true where preconditioned gradients and the plain ones are finite."""
        # A non-finite entry of V makes ⟨P, V⟩ non-finite: P holds its products with whole rows and columns of inverses.
        flags = [products.isfinite().all() for _, products in self.done.dots]
        seen = {id(p) for layer in self.ready if layer.adapter.slices is None for p in layer.parameters}
        rest = [p.grad for group in groups for p in group["params"] if p.grad is not None and id(p) not in seen]
        return [*flags, *all_finite(rest)]


def propose(
    structure: Structures,
    layers: Sequence[Layer],
    groups: Groups,
    averages: Mapping[str, Average],
    due: Sequence[Layer],
    damping: Callable[[Layer], float],
    rows: Mapping[str, GradientRows] | None = None,
    arrived: Mapping[str, Factorisation] = MappingProxyType({}),
) -> Proposal:
    """Invert the layers that are due and precondition all that have gradients and an inverse.

    Args:
        structure: how factors are inverted and applied.
        layers: the covered layers; none of them is changed.
        groups: checked param groups.
        averages: the new averages, by layer name.
        due: layers with factors whose inverses are to be renewed.
        damping: of a layer.
        rows: by layer name, what may form the layer's gradient.
        arrived: inverses made beforehand for this step, by layer name.
    """
    newest = {layer.name: layer.factors for layer in layers if layer.factors is not None}
    newest.update((name, some.factors) for name, some in averages.items())
    inverses: dict[str, Factorisation] = {}
    retries = 0
    if due:
        dampings = [damping(layer) for layer in due]
        values, retries = factorise(structure, due, [newest[layer.name] for layer in due], dampings)
        inverses = {layer.name: value for layer, value in zip(due, values, strict=True) if value is not None}
        retries += link_layers(due, layers, newest, inverses, dampings)
    failures = len(due) - len(inverses)
    inverses.update(arrived)
    renewed = [layer for layer in layers if layer.name in inverses]
    newest.update(carry(structure, renewed, [newest[layer.name] for layer in renewed], inverses))

    active = [layer for layer in layers if all(p.grad is not None for p in layer.parameters)]
    ready: list[Layer] = []
    current: list[Factorisation] = []
    for layer in active:
        factorisation = inverses.get(layer.name, layer.factorisation)
        if factorisation is not None:
            ready.append(layer)
            current.append({**factorisation, **newest[layer.name].extra} if layer.statistics else factorisation)
    done = precondition(
        structure,
        [layer.block for layer in ready],
        [partial(_regularised_gradient, layer, groups) for layer in ready],
        current,
        [damping(layer) for layer in ready],
        [None if rows is None or any(l2(groups[i]) for i in layer.groups) else rows.get(layer.name) for layer in ready],
        successors(ready),
    )
    bare = tuple(layer.name for layer in active if layer.factors is None and layer.name not in averages)
    updates = {name: some.updates for name, some in averages.items()}
    return Proposal(newest, updates, inverses, retries, failures, ready, done, bare)


def commit(layers: Iterable[Layer], own: Proposal, step: int, made: Mapping[str, int] = MappingProxyType({})) -> None:
    """Hand the averages and inverses of a proposal over to the layers.

    Args:
        layers: the covered layers.
        own: what was proposed.
        step: of this step.
        made: the step that inverses belong to which were asked for earlier, by layer name.
    """
    for layer in layers:
        layer.factors = own.factors.get(layer.name)
        layer.updates = own.updates.get(layer.name, layer.updates)
        if layer.name in own.inverses:
            layer.factorisation, layer.made = own.inverses[layer.name], made.get(layer.name, step)


def unscale(groups: Groups, scale: Tensor) -> None:
    """Divide all gradients by GradScaler's scale, in place as `GradScaler.unscale_` does."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_device.setdefault(parameter.grad.device, []).append(parameter.grad)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, scale.to(device, non_blocking=True).reciprocal())


def world_size() -> int:
    """Ranks in the default process group, 1 without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def agree(flags: Sequence[Tensor], home: torch.device) -> bool:
    """Read the flags from the device. Under a process group every rank must be sound, so that none runs ahead."""
    alone = world_size() == 1
    if not flags and alone:
        return True
    verdict = torch.stack([flag.to(home, non_blocking=True) for flag in flags or [torch.tensor(True)]]).all()
    if not alone:
        votes = verdict.to(torch.int32)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
        verdict = votes != 0
    return bool(verdict)


def due_for_inverse(layers: Iterable[Layer], averages: Mapping[str, Average], groups: Groups, step: int) -> list[Layer]:
    """The layers with factors that have no inverse, or an inverse that is to be renewed at this step."""
    return [
        layer
        for layer in layers
        if (layer.factors is not None or layer.name in averages)
        and (layer.factorisation is None or step % groups[layer.groups[0]]["inverse_every"] == 0)
    ]


def l2(group: Mapping[str, Any]) -> float:
    """η of a param group as far as it is part of the loss."""
    return 0.0 if group["decoupled"] else float(group["weight_decay"])


def _damping(layer: Layer, groups: Groups) -> float:
    group = groups[layer.groups[0]]
    return float(group["damping"]) + l2(group)


def _regularised_gradient(layer: Layer, groups: Groups) -> Tensor:
    gradient = layer.adapter.gradient()
    decays = [l2(groups[index]) for index in layer.groups]
    if not any(decays):
        return gradient
    return add_weight_decay(gradient, layer.adapter.weight_matrix(), decays, *layer.adapter.parts)


@timed("update")
def _clip_scales(layers: Sequence[Layer], done: Preconditioned, groups: Groups) -> list[Tensor | None]:
    """The KL clip's factor per param group, for the layers that are the group's own; None where nothing is clipped."""
    sets: dict[tuple[int, float], list[Tensor]] = {}
    for chosen, products in done.dots:
        members: dict[tuple[int, float], list[int]] = {}
        for place, position in enumerate(chosen):
            own = layers[position].groups
            lr = max(float(groups[index]["lr"]) for index in own)
            members.setdefault((own[0], lr), []).append(place)
        for key, places in members.items():
            part = products if len(places) == len(chosen) else torch.stack([products[place] for place in places])
            sets.setdefault(key, []).append(part.sum())
    keys = [key for key, sums in sets.items() for _ in sums]
    sums = [part for parts in sets.values() for part in parts]
    scales = kl_scales(sums, [lr for _, lr in keys], [groups[group]["kl_clip"] for group, _ in keys])
    result: list[Tensor | None] = [None] * len(groups)
    for (group, _), scale in zip(keys, scales, strict=True):
        if scale is not None:
            result[group] = scale
    return result


def _norm_scales(
    layers: Sequence[Layer], matrices: Sequence[Tensor], groups: Groups, scales: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The norm constraint's factor per param group, after the KL clip's; None where nothing is bounded."""
    result: list[Tensor | None] = [None] * len(groups)
    sets: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
    for layer, matrix in zip(layers, matrices, strict=True):
        if groups[layer.groups[0]]["norm_constraint"] is not None:
            sets.setdefault((layer.groups[0], matrix.device, matrix.dtype), []).append(matrix)
    squares = []
    for (group, device, dtype), members in sets.items():
        wide = dtype if dtype == torch.float64 else torch.float32
        square = torch.stack(list(torch._foreach_norm(members, 2, dtype=wide))).square().sum()
        scale = scales[group]
        squares.append(square if scale is None else square * scale.to(device, non_blocking=True) ** 2)
    bounds = norm_scales(squares, [groups[group]["norm_constraint"] for group, _, _ in sets])
    for (group, _, _), bound in zip(sets, bounds, strict=True):
        result[group] = bound
    return result


def _products(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Factor by factor, None standing for 1."""
    return [
        b if a is None else a if b is None else a * b.to(a.device, a.dtype, non_blocking=True)
        for a, b in zip(one, other, strict=True)
    ]


@timed("update")
def _move(
    layers: Sequence[Layer],
    matrices: Sequence[Tensor],
    groups: Groups,
    state: MutableMapping[Tensor, dict[str, Tensor]],
    scales: Sequence[Tensor | None],
) -> None:
    """Update all parameters: along the scaled preconditioned gradients where there are some, elsewhere as SGD."""
    found = directions(layers, matrices, groups, _clip(layers, matrices, scales))
    for group in groups:
        moving = [p for p in group["params"] if p.grad is not None]
        chosen = [found[id(p)] for p in moving]
        apply_update(group, moving, [tensor for tensor, _ in chosen], state, [scale for _, scale in chosen])


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
                found[id(p)] = _plain_direction(p, l2(group)), None
    return found


def _plain_direction(parameter: Tensor, decay: float) -> Tensor:
    """As SGD: the gradient of the loss with its L2 term."""
    assert parameter.grad is not None
    return parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad


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
            directions[id(parameter)] = _plain_direction(parameter, l2(groups[index])).clone(), None
        directions[id(parameter)][0][place] = part if scale is None else part * scale


def _clip(layers: Sequence[Layer], matrices: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Apply the KL clip: the factor that each matrix has yet to be multiplied by, None where nothing is left to do.

    On the CPU multiplying waits until the momentum is added, which saves a pass over the matrices; on an accelerator
    one call for all matrices is worth more.
    """
    waiting: list[Tensor | None] = [None] * len(layers)
    at_once: dict[tuple[int, torch.device], list[Tensor]] = {}
    for position, (layer, matrix) in enumerate(zip(layers, matrices, strict=True)):
        scale = scales[layer.groups[0]]
        if scale is None:
            continue
        # A wider matrix is rounded to the parameter's type after scaling: before, float16 may overflow.
        if matrix.is_cpu and scale.is_cpu and matrix.dtype == scale.dtype == layer.parameters[0].dtype:
            waiting[position] = scale
        else:
            at_once.setdefault((layer.groups[0], matrix.device), []).append(matrix)
    for (group, device), members in at_once.items():
        scale = scales[group]
        assert scale is not None
        torch._foreach_mul_(members, scale.to(device, non_blocking=True))
    return waiting
