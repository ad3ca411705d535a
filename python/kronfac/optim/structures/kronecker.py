"""K-FAC proper: one Kronecker product per layer, inverted by its damped factors or exactly in its eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kronfac import ops
from kronfac.curvature import GradientRows
from kronfac.linalg.damped import damped_inverses, eigenbases, factored_damping
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, FactorsOnly, WithoutRows, per_layer


class KroneckerInverse(FactorsOnly):
    """P = (G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹: factored Tikhonov damping (Martens & Grosse, arXiv:1503.05671, section 6.3).

    λ enters when the inverses are made; a change of λ takes effect at the next refresh.
    """

    name = "kfac/inverse"
    by_rows = True

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """The inverses of the damped G ("left") and A ("right")."""
        return {"left": (outputs, outputs), "right": (inputs, inputs)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`. A layer counts as inverted when both of its factors are."""
        A, G = [pair.A for pair in factors], [pair.G for pair in factors]
        right_damping, left_damping = factored_damping(A, G, per_layer(damping, A))
        # One call for both sides: the operator spreads a ragged list over the threads by itself.
        inverses = damped_inverses([*A, *G], torch.cat([right_damping, left_damping]))
        values: list[Factorisation | None] = []
        for right, left in zip(inverses.values[: len(A)], inverses.values[len(A) :], strict=True):
            values.append(None if left is None or right is None else {"left": left, "right": right})
        return Factorised(values, inverses.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`; `damping` is already inside the inverses."""
        del damping
        return ops.kron_precondition(grads, [f["left"] for f in factorisations], [f["right"] for f in factorisations])

    def apply_rows(self, rows: GradientRows, factorisation: Factorisation) -> tuple[Tensor, Tensor]:
        """See `Structure.apply_rows`: (g G⁻¹)ᵀ ([a 1] A⁻¹)."""
        left, right, x, g = factorisation["left"], factorisation["right"], rows.x, rows.g
        assert g is not None
        y = g @ left
        if rows.adapter.has_bias:
            inputs = x.shape[1]
            z = torch.addmm(right[inputs], x, right[:inputs])
            # ⟨yᵀ z, gᵀ [x 1]⟩ is the sum over all pairs of rows of ⟨y_i, g_j⟩ ⟨z_i, [x_j 1]⟩.
            pairs = torch.addmm(z[:, inputs:], z[:, :inputs], x.mT)
        else:
            z = x @ right
            pairs = z @ x.mT
        dot = (y @ g.mT).mul_(pairs).sum(dtype=torch.float64).to(pairs.dtype)
        return y.mT @ z, dot


class KroneckerEigen(WithoutRows):
    """P = Q_G [(Q_Gᵀ V Q_A) ⊘ (λ_G λ_Aᵀ + λ)] Q_Aᵀ: exact damping in the eigenbasis; λ may change at every step.

    The division in the eigenbasis needs the gradient as a matrix.
    """

    name = "kfac/eigen"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Eigenvectors of G ("left_vectors") and A ("right_vectors"), eigenvalues of their product as a matrix."""
        return {
            "left_vectors": (outputs, outputs),
            "right_vectors": (inputs, inputs),
            "eigenvalues": (outputs, inputs),
        }

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`. The factors are diagonalised undamped: λ enters once, in `apply`."""
        del damping
        bases, retried = factor_bases(factors)
        values: list[Factorisation | None] = []
        for pair in bases:
            if pair is None:
                values.append(None)
            else:
                left, right = pair
                product = torch.outer(left[0], right[0])
                values.append({"left_vectors": left[1], "right_vectors": right[1], "eigenvalues": product})
        return Factorised(values, retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        eigenvalues = [f["eigenvalues"] for f in factorisations]
        return ops.eigen_precondition(
            grads,
            [f["left_vectors"] for f in factorisations],
            [f["right_vectors"] for f in factorisations],
            eigenvalues,
            per_layer(damping, eigenvalues),
        )


Basis: TypeAlias = "tuple[Tensor, Tensor]"
"""Eigenvalues (n,) and eigenvectors in columns (n, n)."""


def factor_bases(factors: Sequence[Averages]) -> tuple[list[tuple[Basis, Basis] | None], int]:
    """Eigenbases of G and of A of each layer, None where either resisted, and how many needed another attempt."""
    bases = eigenbases([*(pair.A for pair in factors), *(pair.G for pair in factors)])
    right, left = bases.values[: len(factors)], bases.values[len(factors) :]
    pairs = [None if of_G is None or of_A is None else (of_G, of_A) for of_G, of_A in zip(left, right, strict=True)]
    return pairs, bases.retried
