"""K-FAC's part of a checkpoint: what it consists of, how it is written, and how it is taken up again.

In between stands `kronfac.optim.state_check`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronfac.optim import reading
from kronfac.optim.averaging import Averaged, IterateAverage
from kronfac.optim.background import Background, Finished
from kronfac.optim.layers import Layer
from kronfac.optim.structures import Averages, Factorisation, Structures

KEY = "kronfac"
"""Where K-FAC's own part lies in the state_dict, beside torch's "state" and "param_groups"."""

FORMAT = 2
"""Raised when what is stored changes; a checkpoint of another format is refused."""

COUNTERS = ("step", "skipped_steps", "inverse_failures", "inverse_retries")
"""What an optimizer counts."""


@dataclass(frozen=True)
class LayerState:
    """What a checkpoint says of one layer, already on the layer's device."""

    factors: Averages | None = None
    updates: int = 0
    factorisation: Factorisation | None = None
    made: int | None = None


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that passed every check.

    Attributes:
        base: torch's own part.
        counters: by the names in `COUNTERS`.
        eager: whether statistics are wanted at the next step although none are due.
        seed: that the sampler was seeded with.
        generator_device: kind of device that the sampler's state belongs to.
        generator_state: of the sampler.
        layers: what is kept for each layer that has statistics, by name.
        averages: of the iterates, by the parameter's position.
        pending: inverses that were asked for and are not in use yet, oldest first.
        adaptive: fields of `Adaptation`, None for a checkpoint without.
        unsettled: by how much the optimizer's own step number was ahead of the counted steps, see `Ledger`.
    """

    base: dict[str, Any]
    counters: dict[str, int]
    eager: bool
    seed: int
    generator_device: str
    generator_state: Tensor
    layers: dict[str, LayerState]
    averages: dict[int, Averaged]
    pending: list[Finished]
    adaptive: dict[str, float | None] | None
    unsettled: int = 0


def pack(
    *,
    structure: Structures,
    counters: Mapping[str, int],
    unsettled: int,
    eager: bool,
    generator: torch.Generator,
    layers: Sequence[Layer],
    parameters: Sequence[Tensor],
    averaging: IterateAverage | None,
    background: Background | None,
    adaptive: Mapping[str, float | None] | None,
) -> dict[str, Any]:
    """K-FAC's part of the state_dict: tensors, numbers and strings only, so that ``weights_only=True`` loads it.

    Waits for inverses that are being made in the background; they are stored beside those in use.
    """
    return {
        "format": FORMAT,
        "structure": structure.name,
        "counters": {name: int(counters[name]) for name in COUNTERS},
        "unsettled": unsettled,
        "eager": eager,
        "generator": {
            "device": generator.device.type,
            "seed": generator.initial_seed(),
            "state": generator.get_state(),
        },
        "layers": {
            layer.name: {
                "A": reading.lasting(layer.factors.A),
                "G": reading.lasting(layer.factors.G),
                "extra": reading.all_lasting(layer.factors.extra),
                "updates": layer.updates,
                "factorisation": None if layer.factorisation is None else reading.all_lasting(layer.factorisation),
                "made": layer.made,
            }
            for layer in layers
            if layer.factors is not None
        },
        "adaptive": None if adaptive is None else dict(adaptive),
        "averages": None
        if averaging is None
        else {
            index: {"count": averaging.entries[parameter].count, "value": averaging.entries[parameter].value.clone()}
            for index, parameter in enumerate(parameters)
            if parameter in averaging.entries
        },
        "pending": [
            {
                "made": request.made,
                "retries": request.retries,
                "layers": {name: None if value is None else dict(value) for name, value in request.values.items()},
            }
            for request in (background.finished() if background is not None else ())
        ],
    }


def restore(
    loaded: Loaded,
    *,
    generator: torch.Generator,
    layers: Sequence[Layer],
    parameters: Sequence[Tensor],
    averaging: IterateAverage | None,
    background: Background | None,
) -> None:
    """Take up what a checkpoint says of layers, averages, pending inverses and the sampler. Nothing is raised.

    Args:
        loaded: what `kronfac.optim.state_check.check` returned.
        generator: of the sampler; one on another kind of device is seeded from the checkpoint's seed and step.
        layers: the covered layers, changed in place.
        parameters: of the optimizer, in the order of its groups.
        averaging: of the iterates, if any.
        background: that makes inverses, if any.
    """
    if averaging is not None:
        averaging.restore(parameters, loaded.averages)
    for layer in layers:
        saved = loaded.layers.get(layer.name, LayerState())
        layer.factors, layer.updates = saved.factors, saved.updates
        layer.factorisation, layer.made = saved.factorisation, saved.made
    _take_pending(layers, loaded, background)
    if loaded.generator_device == generator.device.type:
        generator.set_state(loaded.generator_state)
    else:
        generator.manual_seed((loaded.seed + loaded.counters["step"]) % 2**64)


def _take_pending(layers: Sequence[Layer], loaded: Loaded, background: Background | None) -> None:
    """Hand a checkpoint's pending inverses over; without a background thread they are put into use at once.

    Such an optimizer would have used them since the steps they were asked for at.
    """
    if background is not None:
        background.adopt(loaded.pending)
        return
    for request in loaded.pending:
        for layer in layers:
            value = request.values.get(layer.name)
            if value is not None:
                layer.factorisation, layer.made = value, request.made
