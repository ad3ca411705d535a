"""A checkpoint is checked whole before any of it is used: what does not fit is named by its path inside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kronfac.optim.averaging import Averaged, average_dtype
from kronfac.optim.background import Finished
from kronfac.optim.chains import link_shapes
from kronfac.optim.groups import Groups, all_parameters
from kronfac.optim.layers import Layer
from kronfac.optim.options import GROUP_OPTIONS, check_group
from kronfac.optim.state import COUNTERS, FORMAT, KEY, LayerState, Loaded
from kronfac.optim.structures import Averages, Factorisation, Structures
from kronfac.optim.update import MOMENTUM

_WHERE = "KFAC.load_state_dict"


def check(
    state_dict: object,
    *,
    structure: Structures,
    generator: torch.Generator,
    layers: Sequence[Layer],
    groups: Groups,
    averaging: bool,
    adaptive: Sequence[str] | None,
) -> Loaded:
    """Check a whole checkpoint against an optimizer without touching the optimizer.

    Returns:
        The checkpoint's content; every tensor a copy on the device and in the dtype where it belongs.

    Raises:
        ValueError: the first thing that does not fit, by its path inside the checkpoint.
    """
    top = _mapping("state_dict", state_dict, ("state", "param_groups", KEY), hint="was it written by kronfac.KFAC?")
    own = _mapping(KEY, top[KEY], ("format", "structure", "counters", "eager", "generator", "layers", "pending"))
    version = _integer(f"{KEY}.format", own["format"])
    if version != FORMAT:
        raise ValueError(
            f"{_WHERE}: {KEY}.format: expected {FORMAT}, got {version}; load it with the kronfac release that wrote it"
        )
    if own["structure"] != structure.name:
        raise ValueError(
            f"{_WHERE}: {KEY}.structure: expected {structure.name!r}, got {own['structure']!r}; "
            "make the optimizer with the checkpoint's structure= and solve="
        )
    counters = _mapping(f"{KEY}.counters", own["counters"], COUNTERS)
    kept = _layers(own["layers"], layers, structure)
    if not isinstance(own["eager"], bool):
        raise ValueError(f"{_WHERE}: {KEY}.eager: expected a bool, got {_describe(own['eager'])}")
    kind = _mapping(f"{KEY}.generator", own["generator"], ("device", "seed", "state"))
    return Loaded(
        base={"state": _momenta(top["state"], groups), "param_groups": _groups(top["param_groups"], groups)},
        counters={name: _integer(f"{KEY}.counters.{name}", counters[name]) for name in COUNTERS},
        eager=own["eager"],
        seed=_integer(f"{KEY}.generator.seed", kind["seed"]),
        generator_device=str(kind["device"]),
        generator_state=_generator_state(kind, generator),
        averages=_averages(own.get("averages"), all_parameters(groups), averaging),
        layers=kept,
        pending=_pending(own["pending"], layers, structure, kept, counters["step"]),
        adaptive=_adaptive(own.get("adaptive"), adaptive),
        unsettled=_integer(f"{KEY}.unsettled", own.get("unsettled", 0)),
    )


def _layers(value: object, layers: Sequence[Layer], structure: Structures) -> dict[str, LayerState]:
    known = {layer.name: layer for layer in layers}
    saved = _mapping(f"{KEY}.layers", value)
    foreign = [name for name in saved if name not in known]
    if foreign:
        raise ValueError(
            f"{_WHERE}: {KEY}.layers: expected layers among {sorted(known)}, got {foreign[0]!r}; "
            "the checkpoint belongs to another model or to other params"
        )
    result = {}
    for name, entry in saved.items():
        layer, where = known[name], f"{KEY}.layers.{name}"
        fields = _mapping(where, entry, ("A", "G", "extra", "updates", "factorisation", "made"))
        A, G = layer.factor_shapes
        factors = Averages(
            A=_tensor(f"{where}.A", fields["A"], A, layer),
            G=_tensor(f"{where}.G", fields["G"], G, layer),
            extra=_extra(f"{where}.extra", fields["extra"], layer, whole=fields["factorisation"] is not None),
        )
        factorisation = None
        if fields["factorisation"] is not None:
            linked = link_shapes(layer, known)
            factorisation = _factorisation(f"{where}.factorisation", fields["factorisation"], layer, structure, linked)
        made = None if fields["made"] is None else _integer(f"{where}.made", fields["made"])
        updates = _integer(f"{where}.updates", fields["updates"])
        result[name] = LayerState(factors, updates, factorisation, made)
    return result


def _factorisation(
    where: str,
    value: object,
    layer: Layer,
    structure: Structures,
    linked: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Factorisation:
    shapes = dict(structure.shapes(layer.adapter))
    # Absent together where nothing couples the layer to its successor so far.
    if any(key in _mapping(where, value) for key in linked):
        shapes.update(linked)
    tensors = _mapping(where, value, tuple(shapes))
    return {key: _tensor(f"{where}.{key}", tensors[key], shape, layer) for key, shape in shapes.items()}


def _pending(
    value: object, layers: Sequence[Layer], structure: Structures, kept: Mapping[str, LayerState], step: int
) -> list[Finished]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{_WHERE}: {KEY}.pending: expected a list, got {_describe(value)}")
    known = {layer.name: layer for layer in layers}
    result: list[Finished] = []
    for index, entry in enumerate(value):
        where = f"{KEY}.pending[{index}]"
        fields = _mapping(where, entry, ("made", "retries", "layers"))
        made = _integer(f"{where}.made", fields["made"])
        least = result[-1].made + 1 if result else 0
        if not least <= made < step:
            raise ValueError(f"{_WHERE}: {where}.made: expected a step from {least} to below {step}, got {made}")
        values: dict[str, Factorisation | None] = {}
        for name, tensors in _mapping(f"{where}.layers", fields["layers"]).items():
            if name not in kept or kept[name].factorisation is None:
                raise ValueError(
                    f"{_WHERE}: {where}.layers: expected layers that have an inverse in use, got {name!r}; "
                    "the checkpoint is corrupt"
                )
            within = f"{where}.layers.{name}"
            values[name] = None if tensors is None else _factorisation(within, tensors, known[name], structure)
        result.append(Finished(made, values, _integer(f"{where}.retries", fields["retries"])))
    return result


def _extra(where: str, value: object, layer: Layer, *, whole: bool) -> dict[str, Tensor]:
    """The further averages; with `whole` none of them may be missing."""
    tensors = _mapping(where, value, tuple(layer.statistics) if whole else ())
    foreign = [key for key in tensors if key not in layer.statistics]
    if foreign:
        raise ValueError(f"{_WHERE}: {where}: expected keys among {sorted(layer.statistics)}, got {foreign[0]!r}")
    return {
        key: _tensor(f"{where}.{key}", tensor, layer.statistics[key].shape, layer) for key, tensor in tensors.items()
    }


def _groups(value: object, groups: Groups) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or len(value) != len(groups):
        got = f"{len(value)} groups" if isinstance(value, (list, tuple)) else type(value).__name__
        raise ValueError(f"{_WHERE}: param_groups: expected {len(groups)} groups, got {got}")
    result, seen = [], 0
    for index, (saved, group) in enumerate(zip(value, groups, strict=True)):
        where = f"param_groups[{index}]"
        fields = _mapping(where, saved, ("params", *GROUP_OPTIONS))
        size = len(group["params"])
        # torch numbers the parameters through all groups; anything else pairs buffers with the wrong parameters.
        if not isinstance(fields["params"], (list, tuple)) or list(fields["params"]) != list(range(seen, seen + size)):
            raise ValueError(
                f"{_WHERE}: {where}.params: expected the indices {seen} to {seen + size - 1}, got {fields['params']!r}"
            )
        seen += size
        try:
            checked = check_group(f"{_WHERE}: {where}", fields)
        except TypeError as error:
            raise ValueError(str(error)) from None
        result.append({**fields, **checked})
    return result


def _momenta(value: object, groups: Groups) -> dict[int, dict[str, Tensor]]:
    parameters = all_parameters(groups)
    result = {}
    for index, entry in _mapping("state", value).items():
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise ValueError(f"{_WHERE}: state: expected indices below {len(parameters)}, got {index!r}")
        fields = _mapping(f"state[{index}]", entry)
        if set(fields) - {MOMENTUM}:
            raise ValueError(
                f"{_WHERE}: state[{index}]: expected only {MOMENTUM!r}, got {sorted(map(str, fields))}; "
                "the checkpoint was written by another optimizer"
            )
        where, parameter = f"state[{index}].{MOMENTUM}", parameters[index]
        result[index] = {
            key: _checked(where, tensor, tuple(parameter.shape))
            .detach()
            .to(parameter.device, parameter.dtype, copy=True)
            for key, tensor in fields.items()
        }
    return result


def _averages(value: object, parameters: Sequence[Tensor], wanted: bool) -> dict[int, Averaged]:
    where = f"{KEY}.averages"
    if (value is not None) != wanted:
        has, remedy = ("has none", "without averaging=") if wanted else ("has some", "with the checkpoint's averaging=")
        raise ValueError(f"{_WHERE}: {where}: the checkpoint {has}; make the optimizer {remedy}")
    result = {}
    for index, entry in _mapping(where, {} if value is None else value).items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(parameters):
            raise ValueError(f"{_WHERE}: {where}: expected indices below {len(parameters)}, got {index!r}")
        fields, parameter = _mapping(f"{where}[{index}]", entry, ("count", "value")), parameters[index]
        tensor = _checked(f"{where}[{index}].value", fields["value"], tuple(parameter.shape))
        count = _integer(f"{where}[{index}].count", fields["count"])
        result[index] = Averaged(tensor.detach().to(parameter.device, average_dtype(parameter), copy=True), count)
    return result


def _adaptive(value: object, names: Sequence[str] | None) -> dict[str, float | None] | None:
    where = f"{KEY}.adaptive"
    if (value is None) != (names is None):
        written = "without" if value is None else "with"
        raise ValueError(
            f"{_WHERE}: {where}: the checkpoint was written {written} adaptive=True; make the optimizer so"
        )
    if names is None:
        return None
    fields = _mapping(where, value, names)
    for name in names:
        held = fields[name]
        wanted = "a positive number" if name in ("gamma", "damping") else "a number or None"
        fits = isinstance(held, float) and math.isfinite(held) and (held > 0 or name not in ("gamma", "damping"))
        if not fits and not (held is None and name not in ("gamma", "damping")):
            raise ValueError(f"{_WHERE}: {where}.{name}: expected {wanted}, got {_describe(held)}")
    return {name: fields[name] for name in names}


def _generator_state(kind: Mapping[Any, Any], generator: torch.Generator) -> Tensor:
    state = kind["state"]
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise ValueError(f"{_WHERE}: {KEY}.generator.state: expected a uint8 tensor, got {_describe(state)}")
    state = state.detach().cpu().clone()
    if kind["device"] == generator.device.type:
        try:
            torch.Generator(generator.device).set_state(state)
        except RuntimeError as error:
            raise ValueError(f"{_WHERE}: {KEY}.generator.state: not a state of a torch.Generator: {error}") from None
    return state


def _mapping(where: str, value: object, keys: Sequence[str] = (), hint: str = "") -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{_WHERE}: {where}: expected a dict, got {_describe(value)}")
    missing = [key for key in keys if key not in value]
    if missing:
        remedy = f"; {hint}" if hint else "; the checkpoint is incomplete"
        raise ValueError(f"{_WHERE}: {where}: expected the keys {sorted(keys)}, {missing[0]!r} is missing{remedy}")
    return value


def _integer(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{_WHERE}: {where}: expected an integer >= 0, got {value!r}")
    return value


def _tensor(where: str, value: object, shape: tuple[int, ...], layer: Layer) -> Tensor:
    return _checked(where, value, shape).detach().to(layer.device, layer.dtype, copy=True)


def _checked(where: str, value: object, shape: tuple[int, ...]) -> Tensor:
    numeric = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    if not isinstance(value, Tensor) or not numeric or tuple(value.shape) != shape:
        raise ValueError(
            f"{_WHERE}: {where}: expected a floating-point tensor of shape {shape}, got {_describe(value)}"
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"{_WHERE}: {where}: expected finite values, got NaN or infinity; the checkpoint is corrupt")
    return value


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
