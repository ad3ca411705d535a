"""Which parameters K-FAC covers, layer by layer, and what it keeps for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_

import torch
from torch import Tensor, nn

from kronfac.curvature import ExtraStatistic, LayerAdapter, find_layers
from kronfac.curvature.sharing import set_sharing
from kronfac.curvature.statistics import factor_shapes
from kronfac.optim.groups import Groups, l2
from kronfac.optim.structures import Averages, Factorisation, Kind, Structures

_NAMED_IN_WARNING = 30
_ONE_VALUE_PER_LAYER = ("damping", "kl_clip", "norm_constraint", "factor_every", "inverse_every", "sharing")


@dataclass
class Layer:
    """One covered layer.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        adapter: how the layer yields statistics and its gradient matrix.
        parameters: what the adapter covered when the layers were assigned.
        groups: index of the param group of each parameter; the first is the layer's own.
        block: what the layer's curvature is made of.
        bare: whether it is made without A and G.
        factors: undamped running averages, None before the first statistics.
        updates: how many statistics entered the averages.
        factorisation: the newest good one, None before the first.
        made: the step whose factors are in it.
        statistics: the further statistics that the structure takes of the layer, by name.
        following: name of the next layer of its chain.
        followed: what `following` was when `factors` and `factorisation` were made.
    """

    name: str
    adapter: LayerAdapter
    parameters: tuple[Tensor, ...]
    groups: tuple[int, ...]
    block: Kind
    bare: bool = False
    factors: Averages | None = None
    updates: int = 0
    factorisation: Factorisation | None = None
    made: int | None = None
    statistics: Mapping[str, ExtraStatistic] = field(default_factory=dict)
    following: str | None = None
    followed: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors: float64 for a float64 layer, float32 for every other."""
        return self.adapter.factor_dtype

    def decay(self, factor_decay: float) -> float:
        """Of the averages at their next update: min(1 - 1/k, factor_decay), k counting the updates."""
        return 0.0 if self.factors is None else min(1 - 1 / (self.updates + 1), factor_decay)

    def damping(self, groups: Groups) -> float:
        """λ of the layer's own group with the decay that joins it."""
        group = groups[self.groups[0]]
        return float(group["damping"]) + l2(group)

    @property
    def device(self) -> torch.device:
        """Device of the layer's first parameter."""
        return self.parameters[0].device

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and G."""
        return factor_shapes(self.adapter, self.bare)


@dataclass(frozen=True)
class Coverage:
    """How the parameters of an optimizer are divided.

    Attributes:
        layers: covered layers in the order of ``model.named_modules()``.
        uncovered: why each trainable parameter outside the layers is not covered, by its name.
        frozen: parameters that were not trainable; when one becomes so, the division is out of date.
    """

    layers: list[Layer]
    uncovered: dict[str, str] = field(default_factory=dict)
    frozen: list[Tensor] = field(default_factory=list)

    def outdated(self) -> bool:
        """Whether `requires_grad` of a parameter has changed since the division was made."""
        return any(parameter.requires_grad for parameter in self.frozen) or any(
            not same_tensors(layer.adapter.parameters(), layer.parameters) for layer in self.layers
        )

    def warning(self) -> str | None:
        """The text that names the uncovered parameters, None when there are none."""
        if not self.uncovered:
            return None
        named = [f"{name} ({reason})" for name, reason in self.uncovered.items()]
        rest = len(named) - _NAMED_IN_WARNING
        more = f" and {rest} more" if rest > 0 else ""
        return (
            f"KFAC: {len(named)} of the model's parameters are covered by no layer adapter and train as SGD with the "
            f"same lr, momentum and weight decay: {', '.join(named[:_NAMED_IN_WARNING])}{more}"
        )


def assign(
    model: nn.Module,
    groups: Groups,
    structure: Structures,
    previous: Sequence[Layer] = (),
) -> Coverage:
    """Divide the parameters of `groups` into covered layers and the rest.

    Args:
        model: the module whose layers are looked at.
        groups: the optimizer's param groups.
        structure: decides what a layer's block is made of, and which further statistics are taken of it.
        previous: layers of an earlier division; what they hold is taken over where nothing about the layer changed.

    Returns:
        The division. A parameter shared by several modules is left uncovered: no single layer's statistics describe it.

    Raises:
        ValueError: a layer of which some trainable parameters are in the groups and others are not.
    """
    group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            owners.setdefault(id(parameter), []).append((prefix, module))
            names.setdefault(id(parameter), name)
    known = {layer.name: layer for layer in previous}

    layers: list[Layer] = []
    covered: set[int] = set()
    for name, adapter in find_layers(model).items():
        parameters = adapter.parameters()
        if not any(id(p) in group_of for p in parameters):
            continue
        missing = [names[id(p)] for p in parameters if id(p) not in group_of]
        if missing:
            raise ValueError(
                f"KFAC: params: layer {name!r}: expected all of its trainable parameters or none, {', '.join(missing)} "
                "is missing; its curvature couples them. Add it to params, or freeze it with requires_grad_(False)"
            )
        structure.prepare(adapter)
        block = structure.kind(adapter)
        layer = Layer(name, adapter, parameters, tuple(group_of[id(p)] for p in parameters), block)
        layer.bare = not structure.by_block[block].needs_factors
        layer.statistics = structure.by_block[block].statistics(adapter)
        before = known.get(name)
        if before is not None and same_tensors(before.parameters, parameters):
            layer.factors, layer.updates, layer.factorisation = before.factors, before.updates, before.factorisation
            layer.made = before.made
            layer.followed = before.following
        layers.append(layer)
        covered.update(map(id, parameters))

    uncovered: dict[str, str] = {}
    frozen: list[Tensor] = []
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) in covered:
                continue
            if not parameter.requires_grad:
                frozen.append(parameter)
                continue
            name = names.get(id(parameter), f"params[{index}][{position}]")
            uncovered[name] = _reason(owners.get(id(parameter), []))
    return Coverage(layers, uncovered, frozen)


def check_layers(layers: Iterable[Layer], groups: Groups) -> None:
    """Check that the groups of a layer's parameters agree where the layer needs one value, and set its sharing.

    Raises:
        ValueError: they do not, or the layer's adapter does not follow the sharing; the message names layer and option.
    """
    for layer in layers:
        if groups[layer.groups[0]]["sharing"] != layer.adapter.sharing:
            set_sharing(layer.name, layer.adapter, groups[layer.groups[0]]["sharing"])
        if layer.groups.count(layer.groups[0]) == len(layer.groups):
            continue
        for name in _ONE_VALUE_PER_LAYER:
            values = [groups[index][name] for index in layer.groups]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"KFAC: layer {layer.name!r}: {name}: expected the same value in the groups of its weight and "
                    f"bias, got {values}; they are preconditioned together"
                )


def _reason(owners: Sequence[tuple[str, nn.Module]]) -> str:
    if not owners:
        return "outside the model"
    if len(owners) > 1:
        return "shared by " + " and ".join(repr(name) for name, _ in owners)
    return type(owners[0][1]).__name__


def same_tensors(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two sequences hold the very same tensors."""
    return len(one) == len(other) and all(map(is_, one, other))
