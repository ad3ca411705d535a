"""Plain torch reference of `kronfac::orthogonalize_`: the truth for its tests."""

from __future__ import annotations

from torch import Tensor


def orthogonalize_(w: Tensor, basis: Tensor, passes: int = 2) -> Tensor:
    """Subtract from `w` its components along the rows of `basis`, `passes` times; return their sum."""
    total = w.new_zeros(len(basis))
    for _ in range(passes):
        coefficients = basis @ w
        w.sub_(basis.mT @ coefficients)
        total += coefficients
    return total
