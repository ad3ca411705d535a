"""Checks shared by the fakes of the two preconditioners; the same as in csrc/cpu/two_sided.h."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.ops._checks import (
    NARROW,
    check,
    check_device,
    check_dim,
    check_dtype,
    check_floating,
    check_square,
    shape_string,
)


def check_layer(
    op: str, i: int, grad: Tensor, left: tuple[str, Tensor], right: tuple[str, Tensor], first: tuple[str, Tensor]
) -> None:
    """Check ``grads[i]`` (out, in) against its left (out, out) and right (in, in) matrix.

    `left` and `right` are (argument name, tensor) and have the dtype of `first`; the gradient too, or a narrow one
    beside
    float32.
    """
    first_name, reference = first
    check_dim(op, f"grads[{i}]", grad, 2, "(out, in)")
    sides = ((*left, grad.shape[0]), (*right, grad.shape[1]))
    check_floating(op, f"grads[{i}]", grad)
    for name, matrix, _ in sides:
        check_square(op, f"{name}[{i}]", matrix)
    for name, matrix, _ in sides:
        check_dtype(op, f"{name}[{i}]", matrix, reference.dtype, f"the type of {first_name}")
    check(
        grad.dtype == reference.dtype or (grad.dtype in NARROW and reference.dtype == torch.float32),
        lambda: (
            f"kronfac::{op}: grads[{i}]: expected {reference.dtype} (the type of {first_name})"
            f"{', bfloat16 or float16' if reference.dtype == torch.float32 else ''}, got {grad.dtype}"
        ),
    )
    check_device(op, f"grads[{i}]", grad, reference, first_name)
    for name, matrix, size in sides:
        check_device(op, f"{name}[{i}]", matrix, reference, first_name)
        _check_size(op, f"{name}[{i}]", matrix, size, f"grads[{i}] of shape {shape_string(grad)}")


def _check_size(op: str, arg: str, matrix: Tensor, size: int, grad: str) -> None:
    check(
        matrix.shape[0] == size,
        lambda: f"kronfac::{op}: {arg}: expected shape ({size}, {size}) for {grad}, got {shape_string(matrix)}",
    )
