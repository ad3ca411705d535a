"""What each option of KFAC accepts: one check per option, used at construction, per step, and on checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from kronfac.curvature.sharing import SHARINGS

Schedule: TypeAlias = "Callable[[int], float | None]"
"""A callable of the step (0-based) that gives an option's value for that step."""

SCHEDULABLE = ("lr", "momentum", "damping", "kl_clip", "norm_constraint", "factor_every", "inverse_every")
"""Options that may be a `Schedule`."""

EXTRA_KEYS = (
    "params",
    "param_names",
    "name",
    "initial_lr",
    "swa_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
)
"""What torch itself, its schedulers and its users keep in a param group beside the options."""


def number(
    where: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = True,
) -> float:
    """Return `value` as a float inside [low, high).

    Args:
        where: how the message names the option, for example "KFAC: lr".
        value: what the user gave.
        low: lower end; excluded with `open_low`.
        high: upper end; included only without `open_high`.
        open_low: whether `low` itself is refused.
        open_high: whether `high` itself is refused.

    Raises:
        TypeError: not a real number (bool and Tensor included).
        ValueError: NaN or outside the interval.
    """
    if type(value) is float and low < value < high:  # as at almost every step
        return value
    wanted = f"a number {'>' if open_low else '>='} {low:g}" + (
        f" and {'<' if open_high else '<='} {high:g}" if high < math.inf else ", finite"
    )
    if isinstance(value, Tensor):
        raise TypeError(f"{where}: expected {wanted}, got a Tensor; pass {where.split()[-1]}=tensor.item()")
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{where}: expected {wanted}, got {value!r}")
    result = float(value)
    above = result > low if open_low else result >= low
    below = result < high if open_high else result <= high
    if not (above and below):  # NaN fails both comparisons
        raise ValueError(f"{where}: expected {wanted}, got {value!r}")
    return result


def integer(where: str, value: object, low: int = 1) -> int:
    """Return `value` as an int >= low; TypeError when it is not integral, ValueError below."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{where}: expected an integer >= {low}, got {value!r}")
    result = int(value.__index__())
    if result < low:
        raise ValueError(f"{where}: expected an integer >= {low}, got {value!r}")
    return result


def flag(where: str, value: object) -> bool:
    """Return `value`, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: expected True or False, got {value!r}")
    return value


def choice(where: str, value: object, available: Sequence[str]) -> str:
    """Return `value`, which must be one of `available`."""
    names = ", ".join(repr(name) for name in available)
    if not isinstance(value, str) or value not in available:
        raise ValueError(f"{where}: expected one of {names}, got {value!r}")
    return value


def _bound(where: str, value: object) -> float | None:
    return None if value is None else number(where, value, open_low=True)


def _sharing(where: str, value: object) -> str:
    return choice(where, value, SHARINGS)


GROUP_OPTIONS: Mapping[str, Callable[[str, object], Any]] = {
    "lr": number,
    "momentum": lambda where, value: number(where, value, high=1.0),
    "nesterov": flag,
    "weight_decay": number,
    "decoupled": flag,
    "damping": lambda where, value: number(where, value, open_low=True),
    "kl_clip": _bound,
    "norm_constraint": _bound,
    "factor_every": integer,
    "inverse_every": integer,
    "sharing": _sharing,
}
"""The options a param group may set for itself, each with its check ``(where, value) -> value``."""


def check_group(where: str, group: Mapping[str, object]) -> dict[str, Any]:
    """Check all options of one param group.

    Args:
        where: how messages name the group, for example "KFAC: params[1]".
        group: the options, defaults filled in. Callables of the step are evaluated at step 0 by `evaluate`, not here.

    Returns:
        The checked values, one per name in `GROUP_OPTIONS`.

    Raises:
        TypeError, ValueError: what the failing option's check raises.
    """
    values = {name: check(f"{where}: {name}", group[name]) for name, check in GROUP_OPTIONS.items()}
    if values["nesterov"] and values["momentum"] == 0:
        raise ValueError(f"{where}: nesterov=True needs momentum > 0, got momentum={values['momentum']!r}")
    return values


def evaluate(where: str, name: str, schedule: Schedule, step: int) -> Any:
    """Value of a scheduled option at a step, checked like a constant one.

    Raises:
        TypeError, ValueError: the schedule returned what the option does not accept; the message names the step.
    """
    return GROUP_OPTIONS[name](f"{where}: {name}(step={step})", schedule(step))
