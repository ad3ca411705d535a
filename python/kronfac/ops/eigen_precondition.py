"""Preconditioning in Kronecker-factored eigenbases for all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kronfac import _library as _library
from kronfac.ops._checks import (
    check,
    check_damping,
    check_device,
    check_dim,
    check_dtype,
    check_length,
    check_wide,
    shape_string,
)
from kronfac.ops._detached import detached, register_fake, wants_graph
from kronfac.ops._layers import check_layer

_OP = "eigen_precondition"


def eigen_precondition(
    grads: Sequence[Tensor],
    left_vectors: Sequence[Tensor],
    right_vectors: Sequence[Tensor],
    eigenvalues: Sequence[Tensor],
    damping: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Return ``Q_L [(Q_L^T grad Q_R) / (E + damping)] Q_R^T`` and its inner product with the gradient, for all layers.

    ``E`` is the outer product of the factors' eigenvalues for K-FAC with exact damping, or any second moment in that
    basis for EKFAC (George et al., arXiv:1806.03884). The damping enters here and nowhere else: take the bases from
    `damped_eigh` with damping 0. Layers and parts of large layers are shared among threads. On a GPU large layers are
    multiplied by cuBLAS, which rounds float32 factors to TF32 where ``torch.backends.cuda.matmul`` allows it; small
    ones never do. Differentiable any number of times in all tensor arguments.

    Args:
        grads: gradients (out_i, in_i), any strides; float32 or float64 like the bases, or bfloat16 or float16 beside
            float32 bases. Products and sums are made in the bases' dtype.
        left_vectors: bases (out_i, out_i), eigenvectors as columns, any strides, all float32 or all float64.
        right_vectors: bases (in_i, in_i) of the same dtype.
        eigenvalues: matrices (out_i, in_i) of the same dtype, any strides. Where an entry plus the damping is 0 the
            quotient is infinite or NaN, as in any division.
        damping: what is added to the eigenvalues, finite and >= 0: shape (len(grads),), or () for one value for all;
            of the dtype of the bases.

    Returns:
        The products, contiguous, each in the dtype of its gradient; and ``dots`` of shape (len(grads),) in the dtype of
        the bases: the inner product of each with its gradient. With ``T = Q_L^T grad Q_R`` it is computed as
        ``sum(T^2 / (E + damping))``, which is the same number without cancellation, and summed in float64.

    Raises:
        RuntimeError: the lists differ in length, ranks, sizes, dtypes or devices do not fit, or `damping` has another
            shape or holds negative or non-finite values.
    """
    graph = wants_graph(grads, left_vectors, right_vectors, eigenvalues, (damping,))
    operator = torch.ops.kronfac.eigen_precondition.default if graph else _DETACHED
    out, dots = operator(list(grads), list(left_vectors), list(right_vectors), list(eigenvalues), damping)
    return out, dots


@register_fake("eigen_precondition")
def _fake(
    grads: Sequence[Tensor],
    left_vectors: Sequence[Tensor],
    right_vectors: Sequence[Tensor],
    eigenvalues: Sequence[Tensor],
    damping: Tensor,
) -> tuple[list[Tensor], Tensor]:
    check_wide(_OP, "damping", damping)
    check_length(_OP, "left_vectors", left_vectors, len(grads), "grads")
    check_length(_OP, "right_vectors", right_vectors, len(grads), "grads")
    check_length(_OP, "eigenvalues", eigenvalues, len(grads), "grads")
    for i, grad in enumerate(grads):
        left, right = ("left_vectors", left_vectors[i]), ("right_vectors", right_vectors[i])
        check_layer(_OP, i, grad, left, right, ("damping", damping))
        _check_eigenvalues(i, grad, eigenvalues[i], damping)
    check_damping(_OP, damping, len(grads), damping.dtype, "its own type")
    return [grad.new_empty(grad.shape) for grad in grads], damping.new_empty(len(grads))


def _check_eigenvalues(i: int, grad: Tensor, spectrum: Tensor, damping: Tensor) -> None:
    arg = f"eigenvalues[{i}]"
    check_dim(_OP, arg, spectrum, 2, "(out, in)")
    check_dtype(_OP, arg, spectrum, damping.dtype, "the type of damping")
    check_device(_OP, arg, spectrum, damping, "damping")
    for dim in (0, 1):
        check(
            spectrum.shape[dim] == grad.shape[dim],
            lambda: (
                f"kronfac::{_OP}: {arg}: expected the shape of grads[{i}] {shape_string(grad)}, "
                f"got {shape_string(spectrum)}"
            ),
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grads, left, right, eigenvalues, damping = inputs
    ctx.set_materialize_grads(False)
    ctx.layers = len(grads)
    ctx.save_for_backward(*grads, *left, *right, *eigenvalues, damping)


def _backward(ctx: Any, out_bar: list[Tensor | None], dots_bar: Tensor | None) -> tuple[Any, ...]:
    # T = Ql^T V Qr, P = T / D with D = E + damping, out = Ql P Qr^T, dot = sum(T * P).
    n, saved = ctx.layers, ctx.saved_tensors
    damping = saved[4 * n]
    shifts = damping.expand(n)
    bars: tuple[list[Tensor | None], ...] = ([], [], [], [])
    shift_bars: list[Tensor] = []
    for i in range(n):
        grad, left, right, spectrum = (saved[k * n + i] for k in range(4))
        bar = out_bar[i]
        if bar is None and dots_bar is None:
            for bucket in bars:
                bucket.append(None)
            shift_bars.append(damping.new_zeros(()))
            continue
        wide = grad.to(left.dtype)
        denominator = spectrum + shifts[i]
        inside = left.mT @ wide @ right
        quotient = inside / denominator
        quotient_bar: Tensor | None = None
        inside_bar: Tensor | None = None
        if bar is not None:
            upstream = bar.to(left.dtype)
            quotient_bar = left.mT @ upstream @ right
        if dots_bar is not None:
            from_dot = dots_bar[i] * inside
            quotient_bar = from_dot if quotient_bar is None else quotient_bar + from_dot
            inside_bar = dots_bar[i] * quotient
        assert quotient_bar is not None
        through = quotient_bar / denominator
        inside_bar = through if inside_bar is None else inside_bar + through
        denominator_bar = -through * quotient
        left_bar = wide @ right @ inside_bar.mT
        right_bar = wide.mT @ left @ inside_bar
        if bar is not None:
            left_bar = left_bar + upstream @ right @ quotient.mT
            right_bar = right_bar + upstream.mT @ left @ quotient
        bars[0].append((left @ inside_bar @ right.mT).to(grad.dtype))
        bars[1].append(left_bar)
        bars[2].append(right_bar)
        bars[3].append(denominator_bar)
        shift_bars.append(denominator_bar.sum())
    if not shift_bars:
        damping_bar = torch.zeros_like(damping)
    else:
        damping_bar = torch.stack(shift_bars) if damping.dim() == 1 else torch.stack(shift_bars).sum()
    return (*bars, damping_bar)


torch.library.register_autograd("kronfac::eigen_precondition", _backward, setup_context=_setup_context)
_DETACHED = detached(_OP)
