"""Checks that the spectral methods share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from kronfac.linalg.symmetric import CheckedOperator

Progress = Callable[[int, int | None], None]
"""Called as progress(products done, products in all or None where that is not known beforehand)."""

# A density or trace run holds bases of several probes at once only while they stay below this many bytes.
BASIS_BYTES = 2**30

# What a sketch of the range may take: beyond it the machine would swap, or the process be ended, without a word.
SKETCH_BYTES = 2**33

# A standard error from fewer probes is too unsure to stop by.
LEAST_BEFORE_STOPPING = 16


def check_count(value: object, name: str, caller: str, *, least: int, most: int | None = None) -> int:
    """Return an integer option within its range.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {name}: expected an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        bound = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{caller}: {name}: expected {bound}, got {value}")
    return value


def check_positive(value: object, name: str, caller: str) -> float:
    """Return a finite number greater than zero.

    Raises:
        TypeError: not a real number.
        ValueError: not finite or not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: {name}: expected a number, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{caller}: {name}: expected a finite number greater than 0, got {value}")
    return float(value)


def check_choice(value: object, name: str, caller: str, choices: tuple[str, ...]) -> str:
    """Return one of a few words.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{caller}: {name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_sketch(operator: CheckedOperator, columns: int, caller: str) -> None:
    """Refuse a sketch that would not fit into memory.

    Raises:
        ValueError: its three bases are larger than `SKETCH_BYTES`.
    """
    needed = 3 * columns * operator.size * torch.finfo(operator.dtype).bits // 8
    if needed > SKETCH_BYTES:
        raise ValueError(
            f"{caller}: probes: a sketch of {columns} vectors of {operator.size} entries takes {needed / 2**30:.1f} "
            f"GiB, expected at most {SKETCH_BYTES / 2**30:.0f}; use fewer, or method='hutchinson'"
        )
