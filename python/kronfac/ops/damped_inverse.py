"""Inverses of damped factors: ``(F_i + damping_i I)^-1`` for a whole list in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronfac import _library as _library
from kronfac.ops._checks import check_damping, check_device, check_dtype, check_square, check_wide
from kronfac.ops._detached import detached, register_fake, wants_graph
from kronfac.ops._nondifferentiable import refuse_gradients

_OP = "damped_inverse"


def damped_inverse(factors: Sequence[Tensor], damping: Tensor) -> tuple[list[Tensor], Tensor]:
    """Invert ``factors[i] + damping[i] * I`` by Cholesky factorisation, all matrices in one call.

    Each matrix stands alone: one that cannot be inverted is reported in `info` and filled with NaN, and leaves the
    others as they would have been without it. Work is shared among threads across the list, and inside a matrix that
    has more than its share of the whole work; the result is bit for bit the same for any number of threads.

    Args:
        factors: symmetric matrices (n_i, n_i) of any sizes and strides, float32 or float64. Only the lower triangle
            is read, whatever stands in the upper one.
        damping: what is added to each diagonal, finite and >= 0: shape (len(factors),), or () for one value for all;
            of the dtype of the factors.

    Returns:
        The inverses, symmetric to the last bit and contiguous, and ``info``, int32 of shape (len(factors),): 0 for
        success; k > 0 when the leading minor of order k is the first that is not positive (the matrix is not positive
        definite: more damping helps); -1 when the lower triangle, or the inverse itself, is not finite in this dtype.

    Raises:
        RuntimeError: a factor is not a square matrix or not float32 or float64, dtypes or devices differ, `damping`
            has another shape or holds negative or non-finite values, or an input requires grad: the operator is not
            differentiable.

    A float32 inverse is about as accurate as LAPACK's: the tests hold ``max |(F + damping I) X - I|`` to twice its
    value, at condition 1e4 and orders 8 to 1024. (Matrices up to order 128 are inverted in float64 and rounded.)
    """
    operator = torch.ops.kronfac.damped_inverse.default if wants_graph(factors, (damping,)) else _DETACHED
    inverses, info = operator(list(factors), damping)
    return inverses, info


@register_fake("damped_inverse")
def _fake(factors: Sequence[Tensor], damping: Tensor) -> tuple[list[Tensor], Tensor]:
    check_wide(_OP, "damping", damping)
    for i, factor in enumerate(factors):
        check_square(_OP, f"factors[{i}]", factor)
        check_dtype(_OP, f"factors[{i}]", factor, damping.dtype, "the type of damping")
        check_device(_OP, f"factors[{i}]", factor, damping, "damping")
    check_damping(_OP, damping, len(factors), damping.dtype, "its own type")
    inverses = [factor.new_empty(factor.shape[0], factor.shape[0]) for factor in factors]
    return inverses, damping.new_empty(len(factors), dtype=torch.int32)


refuse_gradients(_OP)
_DETACHED = detached(_OP)
