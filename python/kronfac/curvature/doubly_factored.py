"""Doubly factored input statistics: A ≈ K ⊗ Ψ from the leading singular pair of each input as a matrix.

For layers whose A would be too large to keep or to invert (Ba, Grosse & Martens, "Distributed second-order optimization
using Kronecker-factored approximations", 2017, the section on the doubly-factored approximation).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.curvature.adapter import LayerAdapter, accumulate

_SQUARINGS = 10  # the power 1024 of the Gram matrix; see `leading_pairs`
_CHUNK = 1 << 22  # elements of inputs that are worked on at a time: what is held beside them stays near 50 MiB


class InputFactors(NamedTuple):
    """The input side of a doubly factored layer: E[a aᵀ] ≈ (K ⊗ Psi) / ratio for inputs a without the bias's one.

    Attributes:
        K: (d1, d1), the average of k kᵀ; scaled like A.
        Psi: (d2, d2), the average of ψ ψᵀ; scaled like A.
        ratio: (), what the entry of A for the bias would be: 1 without shared positions, T over T positions
            (expand).
    """

    K: Tensor
    Psi: Tensor
    ratio: Tensor

    @classmethod
    def of(cls, packed: Tensor, shape: tuple[int, int]) -> InputFactors:
        """Views of the three in the vector that a layer's A is."""
        K, Psi, ratio = torch.split(packed, [shape[0] ** 2, shape[1] ** 2, 1])
        return cls(K.view(shape[0], shape[0]), Psi.view(shape[1], shape[1]), ratio.view(()))


def packed_size(shape: tuple[int, int]) -> int:
    """Length of the vector that A is."""
    return shape[0] ** 2 + shape[1] ** 2 + 1


def input_shape(adapter: LayerAdapter) -> tuple[int, int] | None:
    """How an input (in,) without the bias's one is read as a matrix (d1, d2), row by row.

    A patch of a convolution is (channels, kernel offsets). Every other input is cut as near to a square as its length
    allows: d1 is the largest divisor of `in` not above √in.

    Returns:
        None where the layer cannot be doubly factored: a prime length, a layer in groups, with another block than a
        Kronecker product, or whose adapter does not hand over its input rows.
    """
    if adapter.block not in ("kronecker", "doubly_factored") or adapter.groups > 1 or not _hands_over_rows(adapter):
        return None
    size, offsets = adapter.in_features, adapter.input_offsets
    if 1 < offsets < size:
        return size // offsets, offsets
    small = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    return (small, size // small) if small > 1 else None


def _hands_over_rows(adapter: LayerAdapter) -> bool:
    """Whether `input_rows` is there and belongs to the `input_statistics` in use, not to those of a base class."""
    kinds = type(adapter).__mro__
    rows, sums = (next(k for k in kinds if name in vars(k)) for name in ("input_rows", "input_statistics"))
    return rows is not LayerAdapter and issubclass(rows, sums)


def doubly_factored_statistics(out: Tensor | None, adapter: LayerAdapter, x: Tensor, mask: Tensor | None) -> Tensor:
    """Add Σ k kᵀ, Σ ψ ψᵀ and the number of rows; what stands in for `LayerAdapter.input_statistics`.

    Args:
        out: sums so far, packed as `InputFactors.of` reads them, updated in place; None for zeros.
        adapter: of a layer with ``input_shape``.
        x: the module's input, detached.
        mask: as in `LayerAdapter.input_statistics`.
    """
    shape = adapter.input_shape
    assert shape is not None
    if out is None:
        out = torch.zeros(packed_size(shape), dtype=adapter.factor_dtype, device=x.device)
    sums = InputFactors.of(out, shape)
    for rows in _chunks(adapter.input_rows(x, mask)):
        k, psi = leading_pairs(rows.to(adapter.factor_dtype).reshape(-1, *shape))
        accumulate(sums.K, k, False)
        accumulate(sums.Psi, psi, False)
        sums.ratio.add_(len(rows))
    return out


def leading_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The best approximation of rank one, k ψᵀ, of each matrix: k = √σ₁ u₁ and ψ = √σ₁ v₁.

    The Gram matrix of the shorter side is squared ten times. The column of its largest diagonal entry then is v₁, up to
    terms (σ₂/σ₁)^2048. Where σ₂ is so near to σ₁ that these are left, k ψᵀ approximates almost as well with any vector
    between v₁ and v₂: on Gaussian matrices σ fell short of σ₁ by at most 5·10⁻⁵. No start vector, no random numbers, a
    fixed amount of work and no wait for the device; several times faster than a batched eigh or svd.

    Args:
        x: (m, d1, d2), float32 or float64.

    Returns:
        k (m, d1) and ψ (m, d2); zeros where the matrix is zero. The common sign is arbitrary.
    """
    if x.shape[1] < x.shape[2]:
        psi, k = leading_pairs(x.mT)
        return k, psi
    tiny = torch.finfo(x.dtype).tiny
    gram = x.mT @ x
    for _ in range(_SQUARINGS):
        # The trace of a power lies between its largest eigenvalue and d2 times that: nothing under- or overflows.
        gram = gram / _diagonals(gram).sum(1).clamp(min=tiny)[:, None, None]
        gram = gram @ gram
    best = _diagonals(gram).argmax(1)
    v = gram.gather(2, best[:, None, None].expand(-1, x.shape[2], 1))
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=tiny)
    y = (x @ v).squeeze(2)  # σ₁ u₁
    root = torch.linalg.vector_norm(y, dim=1, keepdim=True).sqrt()
    return y / root.clamp(min=tiny), v.squeeze(2) * root


def _diagonals(stack: Tensor) -> Tensor:
    return stack.diagonal(dim1=1, dim2=2)


def _chunks(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    for piece in pieces:
        yield from torch.split(piece, max(_CHUNK // max(piece.shape[1], 1), 1))
