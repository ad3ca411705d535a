"""Checks of what the attacks are given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kronfac.linalg.probes import make_generator


def check_inputs(inputs: object, targets: Any, caller: str) -> Tensor:
    """Return the inputs without a graph.

    Raises:
        TypeError: no tensor, or one of numbers that have no gradient.
        ValueError: no leading dimension, NaN or infinity, or targets of another number of examples.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"{caller}: inputs: expected a tensor (N, ...), got {type(inputs).__name__}; a model of several inputs can "
            "be wrapped in one of the input to perturb"
        )
    if not inputs.is_floating_point():
        raise TypeError(
            f"{caller}: inputs: expected a floating-point tensor, got {inputs.dtype}, which has no gradient; convert "
            "raw pixels to floating point; token numbers cannot be perturbed"
        )
    if inputs.element_size() < 2:
        raise TypeError(f"{caller}: inputs: expected float16, bfloat16, float32 or float64, got {inputs.dtype}")
    if inputs.ndim == 0:
        raise ValueError(f"{caller}: inputs: expected a tensor (N, ...), got a scalar")
    if not torch.isfinite(inputs).all():
        raise ValueError(f"{caller}: inputs: expected finite numbers, got NaN or infinity")
    if isinstance(targets, Tensor) and targets.ndim > 0 and len(targets) != len(inputs):
        raise ValueError(f"{caller}: targets: expected those of {len(inputs)} examples, got {len(targets)}")
    return inputs.detach()


def check_eps(eps: object, caller: str) -> float:
    """Return the largest size of a perturbation.

    Raises:
        TypeError: not a number.
        ValueError: negative or not finite.
    """
    return _number(eps, "eps", caller, least=0.0)


def check_step_size(value: object, caller: str) -> float:
    """Return the length of a step.

    Raises:
        TypeError: not a number.
        ValueError: negative, 0 or not finite.
    """
    size = _number(value, "step_size", caller, least=0.0)
    if size == 0.0:
        raise ValueError(f"{caller}: step_size: expected a number > 0, got 0")
    return size


def check_steps(steps: object, caller: str) -> int:
    """Return the number of steps.

    Raises:
        TypeError: not an integer.
        ValueError: below 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{caller}: steps: expected an integer, got {steps!r}")
    if steps < 1:
        raise ValueError(f"{caller}: steps: expected at least 1, got {steps}")
    return steps


def check_generator(seed: object, caller: str) -> torch.Generator:
    """Return the source of random starts, on the CPU.

    Raises:
        TypeError: neither an integer nor a generator.
        ValueError: a negative seed, or a generator of another device.
    """
    if isinstance(seed, torch.Generator):
        if seed.device.type != "cpu":
            raise ValueError(f"{caller}: seed: expected a generator on the CPU, got one on {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{caller}: seed: expected an integer or a torch.Generator, got {type(seed).__name__}")
    return make_generator(seed, caller)


def _number(value: object, name: str, caller: str, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: {name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{caller}: {name}: expected a finite number >= {least:g}, got {value}")
    return float(value)
