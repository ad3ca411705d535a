"""Damped inverses and eigenbases that never raise for a numerical reason: retried with more damping, then given up on.

The caller decides what stands in for a factor that was given up on (K-FAC keeps its last good inverse).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from kronfac import ops

_T = TypeVar("_T")

RETRIES = 4
"""How often a factor is tried again, each time with ten times the damping."""

PI_RANGE = 1e6
"""π stays in [1/PI_RANGE, PI_RANGE]. The two dampings multiply to λ whatever π is; both stay within float32."""


@dataclass(frozen=True)
class Inverses:
    """What `damped_inverses` achieved.

    Attributes:
        values: one inverse per factor, None where every attempt failed.
        retried: how many factors needed more damping than asked for.
    """

    values: list[Tensor | None]
    retried: int


@dataclass(frozen=True)
class Eigenbases:
    """What `eigenbases` achieved.

    Attributes:
        values: per factor (eigenvalues (n,), eigenvectors (n, n) in columns), None where every attempt failed.
        retried: how many factors needed a shift before the solver converged.
    """

    values: list[tuple[Tensor, Tensor] | None]
    retried: int


def factored_damping(A: Sequence[Tensor], G: Sequence[Tensor], damping: Tensor) -> tuple[Tensor, Tensor]:
    """Split λ over the two factors of each layer: factored Tikhonov damping.

    π² = (tr A / dim A) / (tr G / dim G); A is damped by π√λ and G by √λ/π (Martens & Grosse, arXiv:1503.05671,
    section 6.3). π is kept within [1e-6, 1e6], so that a layer whose factor vanishes is damped by λ all the same.
    Computed on the device without host synchronisation.

    Args:
        A: input factors, (in_i, in_i), of one dtype and device.
        G: output factors, (out_i, out_i), as many.
        damping: λ per layer, shape (len(A),).

    Returns:
        The damping of each A and of each G, both of shape (len(A),).

    Raises:
        ValueError: the three arguments differ in length.
    """
    if not len(A) == len(G) == len(damping):
        raise ValueError(
            "factored_damping: A, G and damping: expected the same number of layers, "
            f"got {len(A)}, {len(G)} and {len(damping)}"
        )
    if not A:
        return damping, damping
    a = torch.stack([_mean_diagonal(factor) for factor in A])
    g = torch.stack([_mean_diagonal(factor) for factor in G])
    pi = pi_from_means(a, g)
    root = damping.sqrt()
    return pi * root, root / pi


def pi_from_means(a: Tensor, g: Tensor) -> Tensor:
    """π = √(a/g) of each layer, within [1e-6, 1e6].

    Args:
        a: mean diagonal entry of A per layer.
        g: mean diagonal entry of G per layer.
    """
    # 0/0 says nothing about the scales; a negative mean can only be rounding of zero.
    ratio = (a.clamp(min=0) / g.clamp(min=0)).nan_to_num(nan=1.0, posinf=PI_RANGE**2)
    return ratio.sqrt().clamp(1 / PI_RANGE, PI_RANGE)


def damped_inverses(factors: Sequence[Tensor], damping: Tensor) -> Inverses:
    """Invert each ``factors[i] + damping[i] I``; one that resists is retried with ten times the damping, four times.

    The retry's damping is never below the rounding error of the factor's mean diagonal entry, so that a damping far
    below the factor's precision still comes to an end. The factors that failed are read from the device: one host
    synchronisation.

    Args:
        factors: symmetric positive semi-definite matrices (n_i, n_i), of one dtype (float32 or float64) and device.
        damping: non-negative, finite, shape (len(factors),).

    Returns:
        `Inverses`; nothing raises for a numerical reason.
    """

    def attempt(some: Sequence[Tensor], shifts: Tensor) -> tuple[list[Tensor], Tensor]:
        inverses, info = ops.damped_inverse(some, shifts)
        return inverses, info == 0  # which says as well that the inverse is finite

    values, retried = _with_retries(attempt, factors, damping)
    return Inverses(values, retried)


def eigenbases(factors: Sequence[Tensor]) -> Eigenbases:
    """Diagonalise each factor; one that the solver fails on is retried in float64 with a growing diagonal shift.

    Eigenvalues below the rounding error of the largest are noise of either sign and are raised to it, which keeps a
    division by (product of eigenvalues + λ) from overflowing however small λ is. A shift that was needed stays in.

    Args:
        factors: symmetric positive semi-definite matrices (n_i, n_i), of one dtype (float32 or float64) and device.

    Returns:
        `Eigenbases`; nothing raises for a numerical reason.
    """
    if not factors:
        return Eigenbases([], 0)
    dtype = factors[0].dtype

    def attempt(some: Sequence[Tensor], shifts: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        wide_spectra, wide_vectors, info = ops.damped_eigh(some, shifts)
        spectra, vectors = [x.to(dtype) for x in wide_spectra], [x.to(dtype) for x in wide_vectors]
        # One entry that is not finite shows in the sum, and that of unit vectors cannot overflow.
        sums = torch.stack([basis.sum() for basis in vectors])
        good = (info == 0) & _all_finite(spectra) & sums.isfinite()
        noise = torch.finfo(dtype).eps
        floored = [torch.maximum(values, values[-1:] * noise) for values in spectra]
        return list(zip(floored, vectors, strict=True)), good

    def in_double(some: Sequence[Tensor], shifts: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        return attempt([factor.double() for factor in some], shifts.double())

    values, retried = _with_retries(attempt, factors, factors[0].new_zeros(len(factors)), again=in_double)
    return Eigenbases(values, retried)


_Attempt: TypeAlias = Callable[[Sequence[Tensor], Tensor], tuple[list[_T], Tensor]]


def _with_retries(
    attempt: _Attempt[_T], factors: Sequence[Tensor], damping: Tensor, again: _Attempt[_T] | None = None
) -> tuple[list[_T | None], int]:
    """Call ``attempt(factors, damping) -> (results, which are good)``, then `again` on what failed, with more damping.

    Without `again`, `attempt` is called again.
    """
    again = again or attempt
    if not factors:
        return [], 0
    results, good = attempt(factors, damping)
    values: list[_T | None] = [*results]
    failed = [index for index, fine in enumerate(good.tolist()) if not fine]
    retried = len(failed)
    for round_ in range(1, RETRIES + 1):
        for index in failed:
            values[index] = None
        if not failed:
            break
        some = [factors[index] for index in failed]
        least = torch.stack([_mean_diagonal(factor).abs() for factor in some]) * torch.finfo(damping.dtype).eps
        # A factor with an overflowing diagonal stays a failure; the operators refuse dampings that are not finite.
        shifts = torch.maximum(damping[failed], least.nan_to_num(nan=0.0, posinf=0.0)) * 10.0**round_
        results, good = again(some, shifts)
        fine = good.tolist()
        for index, result, ok in zip(failed, results, fine, strict=True):
            values[index] = result if ok else None
        failed = [index for index, ok in zip(failed, fine, strict=True) if not ok]
    return values, retried


def _mean_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal().mean()


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """One bool per tensor. The largest magnitude is NaN or infinite as soon as one entry is."""
    return torch.stack(list(torch._foreach_norm(list(tensors), float("inf")))).isfinite()
