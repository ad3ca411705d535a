"""A schedule's checkpoint is checked whole before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT = 1
"""Raised when what is stored changes; a checkpoint of another format is refused."""

_KEYS = (
    "format",
    "schedule",
    "options",
    "epoch",
    "position",
    "updates",
    "batch_size",
    "base_lrs",
    "lrs",
    "lr_scale",
    "log",
    "own",
)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that passed every check; fields as in `BatchSchedule.state_dict`."""

    epoch: int
    position: int
    updates: int
    batch_size: int
    base_lrs: list[float]
    lrs: list[float]
    lr_scale: float
    log: list[dict[str, Any]]
    own: Mapping[Any, Any]


def check(state_dict: object, *, name: str, options: Mapping[str, Any], epochs: int, groups: int) -> Loaded:
    """Check a checkpoint against a schedule without touching the schedule.

    Args:
        state_dict: the checkpoint.
        name: of the schedule.
        options: that it must have been written with.
        epochs: of the schedule.
        groups: of the optimizer.

    Raises:
        ValueError: the first thing that does not fit, by its path inside the checkpoint.
    """
    where = f"{name}.load_state_dict:"
    top = mapping(f"{where} state_dict", state_dict, _KEYS)
    version = count(f"{where} format", top["format"])
    if version != FORMAT:
        raise ValueError(f"{where} format: expected {FORMAT}, got {version}; load it with the release that wrote it")
    if top["schedule"] != name:
        raise ValueError(f"{where} schedule: expected {name!r}, got {top['schedule']!r}")
    saved = mapping(f"{where} options", top["options"], tuple(options))
    for option, value in options.items():
        if saved[option] != value:
            raise ValueError(
                f"{where} options.{option}: expected {value!r}, got {saved[option]!r}; make the schedule with the "
                "checkpoint's options"
            )
    epoch = count(f"{where} epoch", top["epoch"], most=epochs)
    batch_size = count(f"{where} batch_size", top["batch_size"], least=1, most=options["examples"])
    position = count(f"{where} position", top["position"], most=options["examples"])
    if position % batch_size and position != options["examples"]:
        raise ValueError(f"{where} position: expected a multiple of the batch size {batch_size}, got {position}")
    log = top["log"]
    if not isinstance(log, (list, tuple)) or len(log) != epoch:
        raise ValueError(f"{where} log: expected a list of {epoch} rows, one per epoch that is over")
    return Loaded(
        epoch=epoch,
        position=position,
        updates=count(f"{where} updates", top["updates"]),
        batch_size=batch_size,
        base_lrs=_rates(f"{where} base_lrs", top["base_lrs"], groups),
        lrs=_rates(f"{where} lrs", top["lrs"], groups),
        lr_scale=finite(f"{where} lr_scale", top["lr_scale"]),
        log=[_row(f"{where} log[{index}]", row) for index, row in enumerate(log)],
        own=mapping(f"{where} own", top["own"]),
    )


def mapping(where: str, value: object, keys: Sequence[str] = ()) -> Mapping[Any, Any]:
    """Return a dict that has some keys, or raise ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a dict, got {type(value).__name__}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{where}: expected the keys {sorted(keys)}, {missing[0]!r} is missing")
    return value


def count(where: str, value: object, *, least: int = 0, most: int | None = None) -> int:
    """Return an integer in a range, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bound = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{where}: expected an integer {bound}, got {value!r}")
    return value


def finite(where: str, value: object, *, high: float = math.inf) -> float:
    """Return a finite float in [0, high], or raise ValueError."""
    if not isinstance(value, float) or not 0 <= value <= high or math.isinf(value):
        raise ValueError(
            f"{where}: expected a finite number from 0{'' if high == math.inf else f' to {high}'}, got {value!r}"
        )
    return value


def _rates(where: str, value: object, groups: int) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != groups:
        raise ValueError(f"{where}: expected a list of {groups} learning rates, one per param group, got {value!r}")
    return [finite(f"{where}[{index}]", rate) for index, rate in enumerate(value)]


def _row(where: str, value: object) -> dict[str, Any]:
    row = mapping(where, value)
    for key, item in row.items():
        if not isinstance(key, str) or not isinstance(item, (int, float, str, type(None))):
            raise ValueError(f"{where}: expected plain numbers and strings by name, got {key!r}: {item!r}")
    return dict(row)
