"""Statistics of two consecutive layers together: the blocks next to the diagonal of the Fisher matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.extra import ExtraStatistic
from kronfac.curvature.linear import LinearAdapter
from kronfac.curvature.sharing import example_rows, rows

if TYPE_CHECKING:
    from kronfac.curvature.forward import Call


def chainable(adapter: LayerAdapter) -> bool:
    """Whether a layer can be part of a chain: `torch.nn.Linear` with a dense A."""
    return type(adapter) is LinearAdapter and adapter.block == "kronecker"


class CrossStatistic(ExtraStatistic):
    """What two layers, called one after the other, share; sums of zeros wherever a forward does not join them.

    A forward joins them when each was called once, the second right after the first among the covered layers, with the
    same leading dimensions. Of other forwards zeros are counted: the average then is that of less correlated layers,
    and together with the averages of A and G still one that variables can have.

    Args:
        shape: of the sum.
        adapter: of the first layer.
        following: of the second layer.
    """

    joins = True

    def __init__(self, shape: tuple[int, int], adapter: LayerAdapter, following: LayerAdapter) -> None:
        super().__init__(shape)
        self._adapter, self._following = adapter, following

    def _pair(self, call: Call) -> Call | None:
        """The second layer's call where the forward joins the two."""
        other = call.following
        if other is None or other.adapter is not self._following or call.repeated or other.repeated:
            return None
        if call.shape[:-1] != other.shape[:-1] or call.reduced != other.reduced or other.x is None:
            return None
        return other

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self._adapter.factor_dtype, device=self._adapter.weight.device)

    def _add(self, out: Tensor | None, one: Tensor, other: Tensor, scale: float) -> Tensor:
        out = self._zeros() if out is None else out
        return out.addmm_(one.to(out.dtype).mT, other.to(out.dtype), alpha=scale)


class CrossInputs(CrossStatistic):
    """Σ ā_i ā_jᵀ (in_i[+1], in_j[+1]), scaled like A."""

    degree = 0

    def __init__(self, adapter: LayerAdapter, following: LayerAdapter) -> None:
        super().__init__((adapter.factor_sizes[0], following.factor_sizes[0]), adapter, following)

    @property
    def per(self) -> Literal["terms", "positions"]:  # type: ignore[override]
        """As A."""
        return "positions" if self._adapter.reduces else "terms"

    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """Once per call, at its first gradient."""
        del g, scale
        other = self._pair(call)
        if other is None or other.gradient is None or call.crossed:
            return self._zeros() if out is None else out
        call.crossed = True
        return self._add(out, self._rows(call), self._rows(other), 1.0)

    @staticmethod
    def _rows(call: Call) -> Tensor:
        a = next(call.adapter.input_rows(call.inputs, call.mask))
        return torch.cat([a, a.new_ones(len(a), 1)], 1) if call.adapter.has_bias else a


class CrossGradients(CrossStatistic):
    """Σ g_i g_jᵀ (out_i, out_j), scaled like G."""

    def __init__(self, adapter: LayerAdapter, following: LayerAdapter) -> None:
        super().__init__((adapter.out_features, following.out_features), adapter, following)

    @property
    def per(self) -> Literal["terms", "positions"]:  # type: ignore[override]
        """As G."""
        return "terms" if self._adapter.reduces else "positions"

    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """See `ExtraStatistic.add`."""
        other = self._pair(call)
        if other is None or other.gradient is None:
            return self._zeros() if out is None else out
        later, other.gradient = other.gradient, None
        reduced = call.reduced
        one, two = (
            example_rows(some, call.mask, mean=False) if reduced else rows(some, call.mask) for some in (g, later)
        )
        return self._add(out, one, two, scale)
