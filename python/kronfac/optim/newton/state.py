"""Checkpoints of Newton-type optimizers: written, and checked whole before any of one is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kronfac.optim.newton.base import NewtonOptimizer

KEY = "kronfac"
FORMAT = 1
_FIELDS = ("format", "method", "examples", "steps", "propagations", "generator", "values")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that passed every check.

    Attributes:
        groups: torch's param groups.
        steps: counter.
        propagations: counter.
        generator: state of the generator of samples.
        values: of the method.
    """

    groups: list[dict[str, Any]]
    steps: int
    propagations: int
    generator: Tensor
    values: dict[str, Any]


def pack_state(optimizer: NewtonOptimizer, values: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """What is stored beside torch's own part."""
    return {
        KEY: {
            "format": FORMAT,
            "method": optimizer.method,
            "examples": optimizer.examples,
            "steps": optimizer.steps,
            "propagations": optimizer.propagations,
            "generator": generator.get_state(),
            "values": {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()},
        }
    }


def check_state(
    optimizer: NewtonOptimizer,
    state_dict: object,
    check_group: Callable[[str, Mapping[str, Any]], dict[str, Any]],
    check_values: Callable[[str, Mapping[str, Any]], dict[str, Any]],
) -> Loaded:
    """Check a checkpoint against an optimizer without touching the optimizer.

    Raises:
        ValueError: the first thing that does not fit, by its path inside the checkpoint.
    """
    where = f"{optimizer.method}.load_state_dict"
    top = _mapping(f"{where}: state_dict", state_dict, ("param_groups", KEY))
    own = _mapping(f"{where}: {KEY}", top[KEY], _FIELDS)
    for name, expected in (("format", FORMAT), ("method", optimizer.method), ("examples", optimizer.examples)):
        if own[name] != expected:
            raise ValueError(
                f"{where}: {KEY}.{name}: expected {expected!r}, got {own[name]!r}; the checkpoint is of another "
                "optimizer, data set or release"
            )
    for name in ("steps", "propagations"):
        if isinstance(own[name], bool) or not isinstance(own[name], int) or own[name] < 0:
            raise ValueError(f"{where}: {KEY}.{name}: expected an integer >= 0, got {own[name]!r:.80}")
    values = _mapping(f"{where}: {KEY}.values", own["values"], tuple(optimizer.VALUES))
    try:
        checked = check_values(f"{where}: {KEY}.values", values)
        groups = _groups(optimizer, top["param_groups"], check_group, where)
    except TypeError as error:
        raise ValueError(str(error)) from None
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in checked.items()}
    return Loaded(groups, own["steps"], own["propagations"], _generator(own["generator"], where), copies)


def _groups(
    optimizer: NewtonOptimizer,
    value: object,
    check_group: Callable[[str, Mapping[str, Any]], dict[str, Any]],
    where: str,
) -> list[dict[str, Any]]:
    groups = optimizer.param_groups
    if not isinstance(value, list | tuple) or len(value) != len(groups):
        got = f"{len(value)} groups" if isinstance(value, list | tuple) else type(value).__name__
        raise ValueError(f"{where}: param_groups: expected {len(groups)} groups, got {got}")
    result: list[dict[str, Any]] = []
    first, seen = None, 0
    for index, (saved, group) in enumerate(zip(value, groups, strict=True)):
        here = f"{where}: param_groups[{index}]"
        fields = _mapping(here, saved, ("params", *optimizer.OPTIONS))
        numbers = list(range(seen, seen + len(group["params"])))
        if not isinstance(fields["params"], list | tuple) or list(fields["params"]) != numbers:
            raise ValueError(f"{here}.params: expected the indices of {len(numbers)} parameters from {seen} on")
        seen += len(numbers)
        checked = check_group(here, fields)
        if first is not None and checked != first:
            raise ValueError(f"{here}: expected the options of the first group, got others")
        first = checked
        result.append({**fields, **checked})
    return result


def _generator(value: object, where: str) -> Tensor:
    try:
        if not isinstance(value, Tensor):
            raise TypeError(f"got {type(value).__name__}")
        state = value.detach().cpu()
        torch.Generator().set_state(state)
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: {KEY}.generator: expected the state of a CPU generator: {reason}") from None
    return state


def _mapping(where: str, value: object, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a dict, got {type(value).__name__}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{where}: {missing[0]}: missing; was it written by the same optimizer of kronfac?")
    return value
