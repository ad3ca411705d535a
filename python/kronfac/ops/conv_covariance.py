"""Covariance of the patches of a map: the statistics of a convolution, without forming the patches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kronfac import _library as _library  # registers the operators
from kronfac.ops._checks import check, check_device, check_dtype, check_floating, check_weight, shape_string
from kronfac.ops._detached import detached, register_fake, tracing, wants_graph
from kronfac.ops._nondifferentiable import refuse_gradients
from kronfac.ops.covariance import accumulation_dtype


def conv_covariance(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Return scale * sum over the patches p of x of [p 1]^T [p 1].

    Features are ordered as in `torch.nn.functional.unfold` and in a convolution's weight: channel, then kernel
    offset, the last axis fastest. Differentiable with respect to `x`, twice and more.

    Args:
        x: (N, C, *spatial) with one to three spatial axes, any strides; float32, float64, bfloat16 or float16. N or C
            may be 0.
        kernel_size: one entry for each spatial axis, like `stride` and `dilation`; all at least 1.
        stride: steps between patches.
        padding: zeros around `x`: one entry for each axis, or two of them (low, high; axis after axis); not negative.
        dilation: distance of the entries of a patch.
        groups: number of groups of channels with a covariance each, a divisor of C.
        bias: append a one to each patch, as its last feature.
        scale: factor of the result, finite and not negative.

    Returns:
        (d, d) with d = C / groups * offsets, plus one with `bias`; (groups, d, d) when `groups` > 1. Symmetric to the
        last bit; float64 for float64 input, else float32. Sums are formed in that type.

    Raises:
        RuntimeError: wrong rank, dtype or lengths; entries out of range; a dilated kernel larger than the padded map;
            a scale that is negative or not finite.
    """
    operator = torch.ops.kronfac.conv_covariance.default if x.requires_grad or tracing() else _DETACHED
    result: Tensor = operator(x, kernel_size, stride, padding, dilation, groups, bias, scale)
    return result


def conv_covariance_(
    out: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Replace `out` by decay * out + what `conv_covariance` returns, without forming the patches.

    Args:
        out: shaped as the result of `conv_covariance`; any strides; float64 for float64 `x`, else float32. Not read
            when `decay` is 0. It need not be symmetric, and stays so bit for bit if it is.
        x: see `conv_covariance`, like the arguments up to `bias`.
        kernel_size: entries for each spatial axis.
        stride: entries for each spatial axis.
        padding: entries for each spatial axis, or low and high entries.
        dilation: entries for each spatial axis.
        groups: number of groups of channels.
        bias: append a one to each patch.
        decay: factor of the old value, finite and not negative.
        scale: factor of the new term, finite and not negative.

    Raises:
        RuntimeError: what `conv_covariance` raises for; wrong shape, dtype or device of `out`; an expanded `out`; an
            argument that requires grad while grad mode is on. `out` is then unchanged.
    """
    operator = torch.ops.kronfac.conv_covariance_.default if wants_graph((out, x)) else _DETACHED_INTO
    operator(out, x, kernel_size, stride, padding, dilation, groups, bias, decay, scale)


def _check_list(op: str, arg: str, entries: Sequence[int], axes: int, least: int) -> None:
    check(
        len(entries) == axes,
        lambda: f"kronfac::{op}: {arg}: expected {axes} entries, one for each spatial axis of x, got {list(entries)}",
    )
    for entry in entries:
        check(entry >= least, lambda: f"kronfac::{op}: {arg}: expected entries >= {least}, got {list(entries)}")


def _sides(padding: Sequence[int], axes: int) -> list[tuple[int, int]]:
    """Zeros before and behind each axis."""
    if len(padding) == axes:
        return [(side, side) for side in padding]
    return list(zip(padding[::2], padding[1::2], strict=True))


def _output_shape(
    op: str,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    scale: float,
) -> tuple[int, ...]:
    """Check the arguments as the compiled operator does; the shape of its result."""
    check_floating(op, "x", x)
    check(
        3 <= x.dim() <= 5,
        lambda: (
            f"kronfac::{op}: x: expected a tensor (N, C, *spatial) with 1 to 3 spatial axes, "
            f"got shape {shape_string(x)}"
        ),
    )
    axes = x.dim() - 2
    _check_list(op, "kernel_size", kernel_size, axes, 1)
    _check_list(op, "stride", stride, axes, 1)
    _check_list(op, "dilation", dilation, axes, 1)
    check(
        len(padding) in (axes, 2 * axes),
        lambda: (
            f"kronfac::{op}: padding: expected {axes} or {2 * axes} entries (one, or low and high, for each spatial "
            f"axis of x), got {list(padding)}"
        ),
    )
    _check_list(op, "padding", padding, len(padding), 0)
    check_weight(op, "scale", scale)
    check(
        groups >= 1 and x.shape[1] % groups == 0,
        lambda: f"kronfac::{op}: groups: expected a positive divisor of the {x.shape[1]} channels of x, got {groups}",
    )
    d = x.shape[1] // groups
    for axis, (low, high) in enumerate(_sides(padding, axes)):
        padded = x.shape[2 + axis] + low + high
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        check(
            padded >= reach,
            lambda reach=reach, padded=padded, axis=axis: (  # type: ignore[misc]
                f"kronfac::{op}: kernel_size: expected the dilated kernel to fit into the padded x, "
                f"got {reach} > {padded} on spatial axis {axis}"
            ),
        )
        d = d * kernel_size[axis]
    d = d + int(bias)
    return (groups, d, d) if groups > 1 else (d, d)


@register_fake("conv_covariance")
def _(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    scale: float = 1.0,
) -> Tensor:
    shape = _output_shape("conv_covariance", x, kernel_size, stride, padding, dilation, groups, bias, scale)
    return x.new_empty(shape, dtype=accumulation_dtype(x))


@register_fake("conv_covariance_")
def _(
    out: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    op = "conv_covariance_"
    shape = _output_shape(op, x, kernel_size, stride, padding, dilation, groups, bias, scale)
    check_weight(op, "decay", decay)
    check(
        out.dim() == len(shape) and all(out.shape[i] == size for i, size in enumerate(shape)),
        lambda: f"kronfac::{op}: out: expected shape {list(shape)}, got {shape_string(out)}",
    )
    check_dtype(op, "out", out, accumulation_dtype(x), "what covariances of this x come out as")
    check_device(op, "out", out, x, "x")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.bias, ctx.scale = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return (_input_gradient(ctx, x.to(grad.dtype), grad).to(x.dtype), *[None] * 7)


def _input_gradient(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient with respect to the map: patches [P 1] times (grad + grad^T), folded back.

    The product of the patches with a matrix is a convolution with that matrix as weight, so the patches are not
    formed here either; every step is differentiable, for the backward of the backward.
    """
    if x.numel() == 0 or grad.numel() == 0:
        return torch.zeros_like(x)
    axes = x.dim() - 2
    spatial = tuple(range(2, 2 + axes))
    groups, kernel_size, channels = ctx.groups, tuple(ctx.kernel_size), x.shape[1] // ctx.groups
    offsets = torch.Size(kernel_size).numel()
    features = channels * offsets
    symmetric = ctx.scale * (grad + grad.mT).reshape(groups, *grad.shape[-2:])
    weight = symmetric[:, :features, :features].reshape(groups * features, channels, *kernel_size)
    constant = symmetric[:, features, :features].reshape(groups * features) if ctx.bias else None

    sides = _sides(ctx.padding, axes)
    padded = torch.nn.functional.pad(x, [side for pair in reversed(sides) for side in pair])
    convolution = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[axes - 1]
    product = convolution(padded, weight, constant, ctx.stride, 0, ctx.dilation, groups)
    product = product.reshape(len(x), x.shape[1], offsets, *product.shape[2:])

    gradient = torch.zeros_like(padded)
    for number, offset in enumerate(itertools.product(*map(range, kernel_size))):
        window: list[Any] = [slice(None), slice(None)]
        for axis in range(axes):
            start = offset[axis] * ctx.dilation[axis]
            last = start + (product.shape[3 + axis] - 1) * ctx.stride[axis]
            window.append(slice(start, last + 1, ctx.stride[axis]))
        gradient[tuple(window)] += product[:, :, number]
    for axis, (low, _) in zip(spatial, sides, strict=True):
        gradient = gradient.narrow(axis, low, x.shape[axis])
    return gradient


torch.library.register_autograd("kronfac::conv_covariance", _backward, setup_context=_setup_context)
refuse_gradients("conv_covariance_")
_DETACHED = detached("conv_covariance")
_DETACHED_INTO = detached("conv_covariance_")
