"""Covariance of the rows of a matrix: the statistics of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kronfac import _library as _library  # registers the operators
from kronfac.ops._checks import check, check_device, check_dim, check_dtype, check_floating, check_weight, shape_string
from kronfac.ops._detached import detached, register_fake, tracing, wants_graph
from kronfac.ops._nondifferentiable import refuse_gradients


def covariance(x: Tensor, bias: bool = False, scale: float = 1.0) -> Tensor:
    """Return scale * [x 1]^T [x 1].

    Differentiable with respect to `x`, twice and more.

    Args:
        x: (m, d), any strides; float32, float64, bfloat16 or float16. m or d may be 0.
        bias: append a column of ones to `x`, as its last.
        scale: factor of the result, finite and not negative.

    Returns:
        (d, d), or (d + 1, d + 1) with `bias`: symmetric to the last bit; float64 for float64 input, else float32.
        Sums are formed in that type. On CUDA, float32 factors of a product are rounded to TF32 where torch's matmul
        may do so (`torch.backends.cuda.matmul.allow_tf32`).

    Raises:
        RuntimeError: wrong rank or dtype, or a scale that is negative or not finite.
    """
    result: Tensor
    if x.requires_grad or tracing():
        result = torch.ops.kronfac.covariance.default(x, bias, scale)
    elif scale == 1.0 and not bias:
        result = _DETACHED(x)  # an argument that is left out is not converted: 0.3 us, a sixth of a small call
    else:
        result = _DETACHED(x, bias, scale)
    return result


def covariance_(out: Tensor, x: Tensor, bias: bool = False, decay: float = 0.0, scale: float = 1.0) -> None:
    """Replace `out` by decay * out + scale * [x 1]^T [x 1], without a temporary of the size of `x`.

    Args:
        out: (d, d), or (d + 1, d + 1) with `bias`; any strides; float64 for float64 `x`, else float32. Not read when
            `decay` is 0. It need not be symmetric, and stays so bit for bit if it is.
        x: (m, d), any strides; float32, float64, bfloat16 or float16. m or d may be 0.
        bias: append a column of ones to `x`, as its last.
        decay: factor of the old value, finite and not negative.
        scale: factor of the new term, finite and not negative.

    Raises:
        RuntimeError: wrong rank, size, dtype or device; a decay or scale that is negative or not finite; an expanded
            `out`; an argument that requires grad while grad mode is on. `out` is then unchanged.
    """
    operator = torch.ops.kronfac.covariance_.default if wants_graph((out, x)) else _DETACHED_INTO
    operator(out, x, bias, decay, scale)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type that sums over `x` are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_input(op: str, x: Tensor, scale: float) -> None:
    check_floating(op, "x", x)
    check_dim(op, "x", x, 2, "(m, d)")
    check_weight(op, "scale", scale)


@register_fake("covariance")
def _(x: Tensor, bias: bool = False, scale: float = 1.0) -> Tensor:
    _check_input("covariance", x, scale)
    d = x.shape[1] + int(bias)
    return x.new_empty((d, d), dtype=accumulation_dtype(x))


@register_fake("covariance_")
def _(out: Tensor, x: Tensor, bias: bool = False, decay: float = 0.0, scale: float = 1.0) -> None:
    op = "covariance_"
    _check_input(op, x, scale)
    check_weight(op, "decay", decay)
    d = x.shape[1] + int(bias)
    check(
        out.dim() == 2 and out.shape[0] == d and out.shape[1] == d,
        lambda: (
            f"kronfac::{op}: out: expected shape ({d}, {d}) for x of shape {shape_string(x)}"
            f"{' with bias' if bias else ''}, got {shape_string(out)}"
        ),
    )
    check_dtype(op, "out", out, accumulation_dtype(x), "what covariances of this x come out as")
    check_device(op, "out", out, x, "x")


def _setup_context(ctx: Any, inputs: tuple[Tensor, bool, float], output: Tensor) -> None:
    x, ctx.bias, ctx.scale = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    d = x.shape[1]
    # dS = dX^T X + X^T dX for X = [x 1], so that dX = X (grad + grad^T); its last column belongs to the constant ones.
    symmetric = ctx.scale * (grad + grad.mT)
    gradient = x.to(grad.dtype) @ symmetric[:d, :d]
    if ctx.bias:
        gradient = gradient + symmetric[d, :d]
    return gradient.to(x.dtype), None, None


torch.library.register_autograd("kronfac::covariance", _backward, setup_context=_setup_context)
refuse_gradients("covariance_")
_DETACHED = detached("covariance")
_DETACHED_INTO = detached("covariance_")
