"""Eigendecompositions of damped factors for a whole list in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronfac import _library as _library
from kronfac.ops._checks import (
    check,
    check_damping,
    check_device,
    check_dtype,
    check_length,
    check_square,
    check_wide,
    shape_string,
)
from kronfac.ops._detached import detached, register_fake, wants_graph
from kronfac.ops._nondifferentiable import refuse_gradients

_OP = "damped_eigh"


def damped_eigh(
    factors: Sequence[Tensor], damping: Tensor, basis: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Diagonalise ``factors[i] + damping[i] * I``, all matrices in one call.

    Each matrix stands alone: one that cannot be diagonalised is reported in `info` and filled with NaN, and leaves
    the others as they would have been without it. The matrices are solved side by side on the threads there are,
    except that one with more than its share of the whole work runs alone with the solver's own threads.

    On CUDA, matrices up to order 112 (89 where a block of threads has 99 KiB of shared memory) are solved by Jacobi
    rotations in it, up to 48 in a launch; larger ones of one order together by cuSOLVER's batched solver, up to order
    2048, where the library that torch brings has one (``kronfac info`` says which is in use); all others by
    `torch.linalg.eigh`, one after another, which waits for the device. What is not finite never reaches a library.

    Args:
        factors: symmetric matrices (n_i, n_i) of any sizes and strides, float32 or float64. Only the lower triangle
            is read, whatever stands in the upper one.
        damping: what is added to each diagonal, finite and >= 0: shape (len(factors),), or () for one value for all;
            of the dtype of the factors.
        basis: approximate eigenvectors as columns, one (n_i, n_i) matrix for each factor, such as those of an earlier
            call on a nearby matrix. From order 128 on, a basis that still nearly holds is refined by matrix products
            (Ogita and Aishima, Japan J. Indust. Appl. Math. 35, 2018) instead of solving anew; that succeeds when the
            matrix has hardly changed (in float32 by up to about 1e-5 of its norm), and what fails the test of
            residual and orthogonality is solved in full. The result is as accurate with any basis, even a bad one, as
            without. On CUDA it is not used: whether the test holds is known there only on the device.

    Returns:
        The eigenvalues (n_i,) in ascending order, not below ``damping[i]`` (a factor is positive semi-definite, so
        what lies below is rounding); the eigenvectors (n_i, n_i) as orthonormal columns, in column-major storage
        (strides (1, n_i)); and ``info``, int32 of shape (len(factors),): 0 for success, 1 when the solver did not
        converge, -1 when the lower triangle is not finite (on CUDA also when the damping is not finite or negative).

    Raises:
        RuntimeError: a factor or basis is not a square matrix or not float32 or float64, sizes, dtypes or devices
            differ, `damping` has another shape or, on the CPU, holds negative or non-finite values, or an input
            requires grad: the operator is not differentiable.
    """
    operator = torch.ops.kronfac.damped_eigh.default if wants_graph(factors, (damping,), basis or ()) else _DETACHED
    values, vectors, info = operator(list(factors), damping, None if basis is None else list(basis))
    return values, vectors, info


@register_fake("damped_eigh")
def _fake(
    factors: Sequence[Tensor], damping: Tensor, basis: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    check_wide(_OP, "damping", damping)
    for i, factor in enumerate(factors):
        check_square(_OP, f"factors[{i}]", factor)
        check_dtype(_OP, f"factors[{i}]", factor, damping.dtype, "the type of damping")
        check_device(_OP, f"factors[{i}]", factor, damping, "damping")
    if basis is not None:
        check_length(_OP, "basis", basis, len(factors), "factors")
        for i, (factor, vectors) in enumerate(zip(factors, basis, strict=True)):
            _check_basis(i, factor, vectors, damping)
    check_damping(_OP, damping, len(factors), damping.dtype, "its own type")
    values = [factor.new_empty(factor.shape[0]) for factor in factors]
    columns = [factor.new_empty(factor.shape[0], factor.shape[0]).mT for factor in factors]
    return values, columns, damping.new_empty(len(factors), dtype=torch.int32)


def _check_basis(i: int, factor: Tensor, vectors: Tensor, damping: Tensor) -> None:
    check_square(_OP, f"basis[{i}]", vectors)
    check_dtype(_OP, f"basis[{i}]", vectors, damping.dtype, "the type of damping")
    check_device(_OP, f"basis[{i}]", vectors, damping, "damping")
    check(
        vectors.shape[0] == factor.shape[0],
        lambda: (
            f"kronfac::{_OP}: basis[{i}]: expected the shape of factors[{i}] {shape_string(factor)}, "
            f"got {shape_string(vectors)}"
        ),
    )


refuse_gradients(_OP)
_DETACHED = detached(_OP)
