"""One step as a transaction: everything is computed first, and committed only when all of it is finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from kronfac.curvature import GradientRows, ScaledSums
from kronfac.optim import reading
from kronfac.optim.background import Arrived, Background
from kronfac.optim.chains import link_layers, successors
from kronfac.optim.directions import clip_scales, layer_gradient, move, norm_constraint_scales, products
from kronfac.optim.groups import Groups, all_parameters, home_of, l2
from kronfac.optim.layers import Layer
from kronfac.optim.ranks import Flag, agree, verdict
from kronfac.optim.refresh import (
    Average,
    Preconditioned,
    all_finite,
    average,
    carry,
    factorise,
    is_finite,
    precondition,
    sums_finite,
)
from kronfac.optim.structures import Averages, Factorisation, Structures


@dataclass(frozen=True)
class Outcome:
    """What `advance` did.

    Attributes:
        applied: False when something was not finite; then nothing was changed.
        verdict: where nobody waits to learn whether everything was finite, a bool tensor () that says so: where it is
            False nothing was changed either, although `applied` is True.
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
    verdict: Tensor | None = None


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

    Where inverses are made, asked for or taken up the host waits for the device, also to learn whether everything is
    finite. At all other steps it does not: on an accelerator everything is written under a condition that only the
    device knows, see `Outcome.verdict`.

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
    home = home_of(groups)
    flags = sums_finite(fresh.values()) if fresh else []
    if found_inf is not None:
        flags.append(found_inf.reshape(()) == 0)

    averages = average(layers, fresh, factor_decay)
    due = due_for_inverse(layers, averages, groups, step)
    arrived, later, taking = Arrived(), list[Layer](), False
    if background is not None:
        taking = background.is_due(step)
        arrived = background.arrive(step)
        later = [layer for layer in due if layer.factorisation is not None]
        due = [layer for layer in due if layer.factorisation is None]
    if due:
        # Factorising waits for the device anyway, so the check comes first and spares it a hopeless attempt.
        if not agree(flags, home):
            return Outcome(applied=False)
        flags = []
    own = propose(structure, layers, groups, averages, due, lambda layer: layer.damping(groups), rows, arrived.values)
    ready, done = own.ready, own.done
    good = verdict([*flags, *own.finite(groups)], home)
    unknown: Tensor | None = None
    if isinstance(good, Tensor):
        if due or later or taking or not all(map(reading.deferrable, all_parameters(groups))):
            good = bool(good)
        else:
            unknown, good = good, True
    if not good:
        return Outcome(applied=False)

    commit(layers, own, step, arrived.made, unknown)
    if background is not None:
        background.retire(step)
        snapshot = [_snapshot(layer.factors) for layer in later if layer.factors is not None]
        background.submit(step, structure, later, snapshot, [layer.damping(groups) for layer in later])
    scales = clip_scales(ready, done, groups)
    bounds = norm_constraint_scales(ready, done.matrices, groups, scales)
    move(ready, done.matrices, groups, state, products(scales, bounds), unknown)
    retries, failures = own.retries + arrived.retries, own.failures + arrived.failures
    return Outcome(True, retries, failures, scales, bounds, own.bare, verdict=unknown)


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

    def finite(self, groups: Groups) -> list[Flag]:
        """Verdicts that are all true where preconditioned gradients and the plain ones are finite."""
        # A non-finite entry of V makes ⟨P, V⟩ non-finite: P holds its products with whole rows and columns of inverses.
        flags = [is_finite(products) for _, products in self.done.dots]
        parameters = all_parameters(groups)
        whole = [layer.parameters for layer in self.ready if layer.adapter.slices is None]
        if sum(map(len, whole)) == len(parameters):  # no parameter is in two layers: these are all
            return flags
        seen = {id(p) for some in whole for p in some}
        rest = [p.grad for p in parameters if p.grad is not None and id(p) not in seen]
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
        [partial(layer_gradient, layer, groups) for layer in ready],
        current,
        [damping(layer) for layer in ready],
        [None if rows is None or any(l2(groups[i]) for i in layer.groups) else rows.get(layer.name) for layer in ready],
        successors(ready),
    )
    bare = tuple(layer.name for layer in active if layer.factors is None and layer.name not in averages)
    updates = {name: some.updates for name, some in averages.items()}
    return Proposal(newest, updates, inverses, retries, failures, ready, done, bare)


def commit(
    layers: Iterable[Layer],
    own: Proposal,
    step: int,
    made: Mapping[str, int] = MappingProxyType({}),
    good: Tensor | None = None,
) -> None:
    """Hand the averages and inverses of a proposal over to the layers.

    On an accelerator they are written into the memory of those before: what was captured in a CUDA graph finds them
    there.

    Args:
        layers: the covered layers.
        own: what was proposed.
        step: of this step.
        made: the step that inverses belong to which were asked for earlier, by layer name.
        good: where it is False the averages stay as they are; None for True. There are no new inverses then.
    """
    for layer in layers:
        old, new = layer.factors, own.factors.get(layer.name)
        if new is not None and new is not old:
            before: Mapping[str, Tensor] = {} if old is None else old.extra
            extra = {key: _into(before.get(key), value, good) for key, value in new.extra.items()}
            A, G = (None, None) if old is None else (old.A, old.G)
            new = Averages(_into(A, new.A, good), _into(G, new.G, good), extra)
        layer.factors = new
        layer.updates = own.updates.get(layer.name, layer.updates)
        if layer.name in own.inverses:
            held = layer.factorisation or {}
            layer.factorisation = {
                key: _into(held.get(key), value, good) for key, value in own.inverses[layer.name].items()
            }
            layer.made = made.get(layer.name, step)


def _into(old: Tensor | None, new: Tensor, good: Tensor | None) -> Tensor:
    """A new value, on an accelerator in the memory of the old one, and only where `good` is not False."""
    if new is old or (reading.at_hand(new) and good is None):
        return new
    good = None if good is None else reading.brought(good, new.device)
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new if good is None else torch.where(good, new, torch.zeros_like(new))
    return old.copy_(new) if good is None else torch.where(good, new, old, out=old)


def _snapshot(factors: Averages) -> Averages:
    """Averages that later steps do not write into."""
    return Averages(reading.lasting(factors.A), reading.lasting(factors.G), reading.all_lasting(factors.extra))


def unscale(groups: Groups, scale: Tensor) -> None:
    """Divide all gradients by GradScaler's scale, in place as `GradScaler.unscale_` does."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in all_parameters(groups):
        if parameter.grad is not None:
            by_device.setdefault(parameter.grad.device, []).append(parameter.grad)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, reading.brought(scale, device).reciprocal())


def due_for_inverse(layers: Iterable[Layer], averages: Mapping[str, Average], groups: Groups, step: int) -> list[Layer]:
    """The layers with factors that have no inverse, or an inverse that is to be renewed at this step."""
    return [
        layer
        for layer in layers
        if (layer.factors is not None or layer.name in averages)
        and (layer.factorisation is None or step % groups[layer.groups[0]]["inverse_every"] == 0)
    ]
