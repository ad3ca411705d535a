"""EKFAC: K-FAC's eigenbasis with eigenvalues that are measured in it (George et al., arXiv:1806.03884)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from kronfac import ops
from kronfac.curvature import ExtraStatistic, LayerAdapter
from kronfac.curvature.pairs import RotatedSquares
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, WithoutRows, per_layer
from kronfac.optim.structures.kronecker import factor_bases

SECOND_MOMENT = "S"
"""Name of the running average of the eigenvalues."""


class Ekfac(WithoutRows):
    """P = Q_G [(Q_Gᵀ V Q_A) ⊘ (S + λ)] Q_Aᵀ with S = E[(Q_Gᵀ (per-example gradient) Q_A)²], squared elementwise.

    The basis is renewed with the inverses, S with the statistics. S begins as λ_G λ_Aᵀ, K-FAC's own eigenvalues. When
    the basis changes from Q to Q', S becomes the diagonal in the new basis of the approximation that it stood for:
    (U_G∘U_G) S (U_A∘U_A)ᵀ with U = Q'ᵀ Q.
    """

    name = "ekfac"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Eigenvectors and eigenvalues of G ("left_...") and of A ("right_...")."""
        return {
            "left_vectors": (outputs, outputs),
            "right_vectors": (inputs, inputs),
            "left_values": (outputs,),
            "right_values": (inputs,),
        }

    def statistics(self, adapter: LayerAdapter) -> Mapping[str, ExtraStatistic]:
        """S."""
        return {SECOND_MOMENT: RotatedSquares(adapter)}

    def renew(self, statistics: Mapping[str, ExtraStatistic], factorisation: Factorisation | None) -> None:
        """Take S in the newest basis."""
        moment = cast(RotatedSquares, statistics[SECOND_MOMENT])
        if factorisation is None:
            moment.rotate(None, None)
        else:
            moment.rotate(factorisation["left_vectors"], factorisation["right_vectors"])

    def carry(self, averages: Averages, old: Factorisation | None, new: Factorisation) -> Mapping[str, Tensor]:
        """S in a new basis, as the class says."""
        before = averages.extra.get(SECOND_MOMENT)
        if old is None or before is None:
            return {SECOND_MOMENT: _product(new)}
        left = (new["left_vectors"].mT @ old["left_vectors"]).square_()
        right = (new["right_vectors"].mT @ old["right_vectors"]).square_()
        return {SECOND_MOMENT: left @ before @ right.mT}

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
                vectors = {"left_vectors": left[1], "right_vectors": right[1]}
                values.append({**vectors, "left_values": left[0], "right_values": right[0]})
        return Factorised(values, retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        # As with K-FAC's own: none so small beside the largest that the division may overflow, however small λ is.
        spectra = [f[SECOND_MOMENT] for f in factorisations]
        eigenvalues = [torch.maximum(S, S.amax() * torch.finfo(S.dtype).eps ** 2) for S in spectra]
        return ops.eigen_precondition(
            grads,
            [f["left_vectors"] for f in factorisations],
            [f["right_vectors"] for f in factorisations],
            eigenvalues,
            per_layer(damping, eigenvalues),
        )


def _product(factorisation: Factorisation) -> Tensor:
    left, right = factorisation["left_values"], factorisation["right_values"]
    return torch.mul(left.unsqueeze(-1), right.unsqueeze(-2))
