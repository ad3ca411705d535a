"""Fully connected layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kronfac.curvature.adapter import LayerAdapter, accumulate
from kronfac.curvature.masks import chosen, of_examples
from kronfac.curvature.registry import register_adapter
from kronfac.curvature.sharing import SHARINGS, count, covers, example_rows, rows


@register_adapter(nn.Linear)
class LinearAdapter(LayerAdapter):
    """`torch.nn.Linear` with any leading dimensions: every one of them is a shared position (tokens, patches, ...).

    A mask covers an input when the leading dimensions of the input begin with the mask's shape: a mask (N, T) or
    (N,) for inputs (N, T, in). With sharing="reduce" the first dimension is that of the examples.
    """

    sharings = SHARINGS
    leading_positions = True
    has_pairs = True

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Σ over the rows of x (*, in); see `LayerAdapter.input_statistics`."""
        return accumulate(out, next(self.input_rows(x, mask)), self.has_bias)

    def input_rows(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """All rows at once; see `LayerAdapter.input_rows`."""
        yield example_rows(x, mask, mean=True) if self.reduces else rows(x, mask)

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Σ over the rows of g (*, out); see `LayerAdapter.output_statistics`."""
        g = example_rows(g, mask, mean=False) if self.reduces else rows(g, mask)
        return accumulate(out, g, False, scale)

    def pairs(self, x: Tensor, g: Tensor, mask: Tensor | None, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `LayerAdapter.pairs`; the first dimension is that of the examples."""
        if x.dim() == 1:
            x, g = x.unsqueeze(0), g.unsqueeze(0)
        if mask is not None and covers(mask, x.shape):
            left = of_examples(mask)
            x, g, mask = (chosen(some, left) for some in (x, g, mask))
            if mask.dim() > 1:
                # where and not a product: what is masked may be infinite.
                kept = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
                x, g = (torch.where(kept, t, torch.zeros((), dtype=t.dtype, device=t.device)) for t in (x, g))
        x, g = (t.reshape(len(t), t.shape[1:-1].numel(), t.shape[-1]) for t in (x, g))
        examples = max(rows // max(x.shape[1], 1), 1)
        yield from zip(torch.split(x, examples), torch.split(g, examples), strict=True)

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """Rows of the output that the mask leaves."""
        return count(shape, mask, self.reduces)
