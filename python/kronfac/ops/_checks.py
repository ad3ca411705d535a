"""Argument checks of the fakes, with the messages of csrc/common/checks.h: tracing fails as running would."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)


def check(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise RuntimeError with ``message()`` unless the condition holds; symbolic conditions become guards."""
    torch._check(condition, message)  # type: ignore[no-untyped-call]


def shape_string(tensor: Tensor) -> str:
    """Format a shape as a tuple."""
    return str(tuple(tensor.shape))


def check_dim(op: str, arg: str, tensor: Tensor, dim: int, meaning: str) -> None:
    """Check the number of dimensions."""
    check(
        tensor.dim() == dim,
        lambda: (
            f"kronfac::{op}: {arg}: expected a {dim}-dimensional tensor {meaning}, got shape {shape_string(tensor)}"
        ),
    )


def check_square(op: str, arg: str, tensor: Tensor) -> None:
    """Check for a square matrix."""
    check_dim(op, arg, tensor, 2, "(n, n)")
    check(
        tensor.shape[0] == tensor.shape[1],
        lambda: f"kronfac::{op}: {arg}: expected a square matrix, got shape {shape_string(tensor)}",
    )


def check_wide(op: str, arg: str, tensor: Tensor) -> None:
    """Check for float32 or float64."""
    check(
        tensor.dtype in WIDE,
        lambda: f"kronfac::{op}: {arg}: expected float32 or float64, got {tensor.dtype}",
    )


def check_floating(op: str, arg: str, tensor: Tensor) -> None:
    """Check for one of the four floating types of gradients and activations."""
    check(
        tensor.dtype in WIDE + NARROW,
        lambda: f"kronfac::{op}: {arg}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}",
    )


def check_dtype(op: str, arg: str, tensor: Tensor, expected: torch.dtype, why: str) -> None:
    """Check for one exact dtype."""
    check(
        tensor.dtype == expected,
        lambda: f"kronfac::{op}: {arg}: expected {expected} ({why}), got {tensor.dtype}",
    )


def check_device(op: str, arg: str, tensor: Tensor, reference: Tensor, reference_arg: str) -> None:
    """Check that two arguments share a device."""
    check(
        tensor.device == reference.device,
        lambda: (
            f"kronfac::{op}: {arg}: expected the device of {reference_arg} ({reference.device}), "
            f"got {tensor.device}; move both to one device"
        ),
    )


def check_length(op: str, arg: str, tensors: Sequence[Tensor], expected: int, reference_arg: str) -> None:
    """Check that a list has one entry for each entry of another."""
    check(
        len(tensors) == expected,
        lambda: (
            f"kronfac::{op}: {arg}: expected {expected} tensors, one for each of {reference_arg}, got {len(tensors)}"
        ),
    )


def check_damping(op: str, damping: Tensor, length: int, dtype: torch.dtype, why: str) -> None:
    """Check a damping tensor: one value for each of `length` matrices, or one for all."""
    check(
        damping.dim() == 0 or (damping.dim() == 1 and damping.shape[0] == length),
        lambda: (
            f"kronfac::{op}: damping: expected shape ({length},), one value for each matrix, or (), "
            f"got {shape_string(damping)}"
        ),
    )
    check_dtype(op, "damping", damping, dtype, why)


def check_weight(op: str, arg: str, value: float) -> None:
    """Check a decay or a scale: finite and not negative."""
    check(
        value >= 0 and value < float("inf"),
        lambda: f"kronfac::{op}: {arg}: expected a finite number >= 0, got {value}",
    )
