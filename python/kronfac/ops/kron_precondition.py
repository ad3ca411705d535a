"""Two-sided products with inverse Kronecker factors for all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kronfac import _library as _library
from kronfac.ops._checks import check_length, check_wide
from kronfac.ops._detached import detached, register_fake, wants_graph
from kronfac.ops._layers import check_layer

_OP = "kron_precondition"


def kron_precondition(
    grads: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return ``left[i] @ grads[i] @ right[i]`` and its inner product with ``grads[i]`` for all layers in one call.

    With inverse K-FAC factors ``left = G^-1`` and ``right = A^-1`` this is the preconditioned gradient (Martens and
    Grosse, arXiv:1503.05671, section 4). Layers and parts of large layers are shared among threads; nothing waits for
    the device. On a GPU large layers are multiplied by cuBLAS, which rounds float32 factors to TF32 where
    ``torch.backends.cuda.matmul`` allows it; small ones never do. Differentiable any number of times in all arguments.

    Args:
        grads: gradients (out_i, in_i), any strides; float32 or float64 like the factors, or bfloat16 or float16
            beside float32 factors. Products and sums are made in the factors' dtype.
        left: matrices (out_i, out_i), any strides, all float32 or all float64. They need not be symmetric.
        right: matrices (in_i, in_i) of the same dtype.

    Returns:
        The products, contiguous, each in the dtype of its gradient; and ``dots`` of shape (len(grads),) in the dtype
        of the factors: ``<left[i] grads[i] right[i], grads[i]>``, summed in float64, of the product before it is
        rounded to the dtype of the gradient.

    Raises:
        RuntimeError: the lists differ in length, or ranks, sizes, dtypes or devices do not fit.
    """
    if len(grads) == len(left) == len(right) == 0:
        return [], torch.zeros(0)  # the dispatcher needs a tensor to choose a device by
    operator = torch.ops.kronfac.kron_precondition.default if wants_graph(grads, left, right) else _DETACHED
    out, dots = operator(list(grads), list(left), list(right))
    return out, dots


@register_fake("kron_precondition")
def _fake(grads: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    check_length(_OP, "left", left, len(grads), "grads")
    check_length(_OP, "right", right, len(grads), "grads")
    for i, grad in enumerate(grads):
        check_wide(_OP, f"left[{i}]", left[i])
        check_layer(_OP, i, grad, ("left", left[i]), ("right", right[i]), ("left[0]", left[0]))
    return [grad.new_empty(grad.shape) for grad in grads], left[0].new_empty(len(grads))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grads, left, right = inputs
    ctx.set_materialize_grads(False)
    ctx.layers = len(grads)
    ctx.save_for_backward(*grads, *left, *right)


def _backward(ctx: Any, out_bar: list[Tensor | None], dots_bar: Tensor | None) -> tuple[list[Tensor | None], ...]:
    # With P = L V R the loss depends on (V, L, R) through P and <P, V>; S = dLoss/dP collects both.
    n, saved = ctx.layers, ctx.saved_tensors
    bars: tuple[list[Tensor | None], ...] = ([], [], [])
    for i in range(n):
        grad, left, right = saved[i], saved[n + i], saved[2 * n + i]
        wide = grad.to(left.dtype)
        bar = out_bar[i]
        upstream = None if bar is None else bar.to(left.dtype)
        if dots_bar is not None:
            from_dot = dots_bar[i] * wide
            upstream = from_dot if upstream is None else upstream + from_dot
        if upstream is None:
            for bucket in bars:
                bucket.append(None)
            continue
        grad_bar = left.mT @ upstream @ right.mT
        if dots_bar is not None:
            grad_bar = grad_bar + dots_bar[i] * (left @ wide @ right)
        bars[0].append(grad_bar.to(grad.dtype))
        bars[1].append(upstream @ (wide @ right).mT)
        bars[2].append((left @ wide).mT @ upstream)
    return bars


torch.library.register_autograd("kronfac::kron_precondition", _backward, setup_context=_setup_context)
_DETACHED = detached(_OP)
