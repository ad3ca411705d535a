"""Fully connected layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kronfac.curvature.adapter import LayerAdapter, accumulate
from kronfac.curvature.registry import register_adapter
from kronfac.curvature.sharing import SHARINGS, count, example_rows, rows


@register_adapter(nn.Linear)
class LinearAdapter(LayerAdapter):
    """`torch.nn.Linear` with any leading dimensions: every one of them is a shared position (tokens, patches, ...).

    A mask covers an input when the leading dimensions of the input begin with the mask's shape: a mask (N, T) or
    (N,) for inputs (N, T, in). With sharing="reduce" the first dimension is that of the examples.
    """

    sharings = SHARINGS
    leading_positions = True

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Σ over the rows of x (*, in); see `LayerAdapter.input_statistics`."""
        a = example_rows(x, mask, mean=True) if self.reduces else rows(x, mask)
        return accumulate(out, a, self.has_bias)

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Σ over the rows of g (*, out); see `LayerAdapter.output_statistics`."""
        g = example_rows(g, mask, mean=False) if self.reduces else rows(g, mask)
        return accumulate(out, g, False, scale)

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """Rows of the output that the mask leaves."""
        return count(shape, mask, self.reduces)
