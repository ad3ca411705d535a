"""Gram-Schmidt against stored vectors, for Lanczos with full reorthogonalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac import _library as _library
from kronfac.ops._checks import check, check_device, check_dim, check_dtype, check_wide, shape_string
from kronfac.ops._detached import detached, register_fake, wants_graph
from kronfac.ops._nondifferentiable import refuse_gradients

_OP = "orthogonalize_"


def orthogonalize_(w: Tensor, basis: Tensor, passes: int = 2) -> Tensor:
    """Subtract from `w`, in place, its components along the rows of `basis`: ``w <- w - V^T (V w)``.

    Classical Gram-Schmidt; twice is enough for a `w` that is orthogonal to working precision, unless it lies in the
    span to within that precision (Giraud, Langou, Rozloznik, van den Eshof, Numerische Mathematik 101, 2005). The
    operation is bound by memory: `basis` is read ``passes + 1`` times, because the subtraction of one pass and the
    projection of the next share a reading. The inner products are summed in float64 across blocks; the result is bit
    for bit the same for any number of threads.

    Args:
        w: vector (n,), float32 or float64, any stride; changed in place. Must not share memory with `basis`.
        basis: orthonormal rows (m, n) of the same dtype, any strides (rows that are contiguous in memory are
            fastest).
        passes: how many times the projection is subtracted, at least 1.

    Returns:
        The coefficients (m,) subtracted in all passes together: ``V w`` of the original `w`, up to rounding.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices do not fit, ``passes < 1``, `w` is an expanded tensor or shares
            memory with `basis`, or an input requires grad: the operator is not differentiable.
    """
    operator = torch.ops.kronfac.orthogonalize_.default if wants_graph((w, basis)) else _DETACHED
    coefficients: Tensor = operator(w, basis, passes)
    return coefficients


@register_fake("orthogonalize_")
def _fake(w: Tensor, basis: Tensor, passes: int = 2) -> Tensor:
    check_dim(_OP, "w", w, 1, "(n,)")
    check_dim(_OP, "basis", basis, 2, "(m, n)")
    check_wide(_OP, "w", w)
    check_dtype(_OP, "basis", basis, w.dtype, "the type of w")
    check_device(_OP, "basis", basis, w, "w")
    check(
        basis.shape[1] == w.shape[0],
        lambda: (
            f"kronfac::{_OP}: basis: expected shape (m, {w.shape[0]}) for w of shape {shape_string(w)}, "
            f"got {shape_string(basis)}"
        ),
    )
    check(passes >= 1, lambda: f"kronfac::{_OP}: passes: expected at least 1, got {passes}")
    return w.new_empty(basis.shape[0])


refuse_gradients(_OP)
_DETACHED = detached(_OP)
