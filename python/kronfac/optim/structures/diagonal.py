"""The diagonal of a layer's Fisher block and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kronfac.curvature import ExtraStatistic, LayerAdapter
from kronfac.curvature.pairs import SquaredGradients
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, WithoutRows, finish

DIAGONAL = "D"
"""Name of the running average of the diagonal."""


class Diagonal(WithoutRows):
    """P = V ⊘ (D + λ) with D = E[(per-example gradient)²]. There is nothing to invert; D and λ act at once.

    Layers in groups need no care of their own: everything is elementwise.
    """

    name = "diagonal"
    needs_factors = False

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Nothing is kept beside D."""
        del outputs, inputs
        return {}

    def statistics(self, adapter: LayerAdapter) -> Mapping[str, ExtraStatistic]:
        """The squared gradients of single examples."""
        return {DIAGONAL: SquaredGradients(adapter)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """There is nothing to do."""
        del damping
        return Factorised([{} for _ in factors], 0)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        out = []
        for grad, some, shift in zip(grads, factorisations, damping, strict=True):
            D = some[DIAGONAL]
            out.append(grad.to(D.dtype) / (D + shift))
        return finish(grads, out)
