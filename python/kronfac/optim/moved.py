"""What the optimizer keeps goes along where `model.to` has taken the parameters since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kronfac.optim.background import Background
from kronfac.optim.groups import Groups, all_parameters
from kronfac.optim.layers import Layer
from kronfac.optim.structures import Averages, Factorisation
from kronfac.optim.update import MOMENTUM


def places(groups: Groups) -> list[tuple[torch.dtype, torch.device]]:
    """Where the parameters are now: while that stays the same there is nothing to follow."""
    return [(p.dtype, p.device) for p in all_parameters(groups)]


def follow(
    layers: Sequence[Layer], state: Mapping[Tensor, dict[str, Tensor]], background: Background | None = None
) -> None:
    """Bring factors, factorisations and momentum buffers to the device and type that belong to the parameters now.

    Args:
        layers: the covered layers, changed in place.
        state: of the optimizer, by parameter; changed in place.
        background: inverses that are not in use yet; waits for them where a layer has moved.
    """
    moved = {}
    for layer in layers:
        if layer.factors is None or _fits(layer.factors.A, layer.device, layer.dtype):
            continue
        moved[layer.name] = layer
        A, G, extra = layer.factors
        layer.factors = Averages(
            A.to(layer.device, layer.dtype), G.to(layer.device, layer.dtype), _moved(dict(extra), layer)
        )
        if layer.factorisation is not None:
            layer.factorisation = _moved(layer.factorisation, layer)
    if moved and background is not None:
        background.adopt([replace(one, values=_all_moved(one.values, moved)) for one in background.finished()])
    for parameter, kept in state.items():
        buffer = kept.get(MOMENTUM)
        if buffer is not None and not _fits(buffer, parameter.device, parameter.dtype):
            kept[MOMENTUM] = buffer.to(parameter.device, parameter.dtype)


def _all_moved(
    values: Mapping[str, Factorisation | None], moved: Mapping[str, Layer]
) -> dict[str, Factorisation | None]:
    return {
        name: _moved(value, moved[name]) if value is not None and name in moved else value
        for name, value in values.items()
    }


def _moved(factorisation: Factorisation, layer: Layer) -> Factorisation:
    return {
        key: value.to(layer.device, layer.dtype if value.is_floating_point() else value.dtype)
        for key, value in factorisation.items()
    }


def _fits(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.device == device
