"""Fully connected layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kronfac.curvature.adapter import LayerAdapter, accumulate
from kronfac.curvature.registry import register_adapter


@register_adapter(nn.Linear)
class LinearAdapter(LayerAdapter):
    """`torch.nn.Linear` with any leading dimensions: every one of them is a shared position (tokens, patches, ...).

    A mask covers an input when the leading dimensions of the input begin with the mask's shape: a mask (N, T) or
    (N,) for inputs (N, T, in).
    """

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Σ over the rows of x (*, in); see `LayerAdapter.input_statistics`."""
        return accumulate(out, _rows(x, mask), self.has_bias)

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Σ over the rows of g (*, out); see `LayerAdapter.output_statistics`."""
        return accumulate(out, _rows(g, mask), False, scale)

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """Rows of the output that the mask leaves."""
        if mask is None or not _covers(mask, shape):
            return math.prod(shape[:-1])
        return int(mask.sum()) * math.prod(shape[mask.dim() : -1])


def _covers(mask: Tensor, shape: torch.Size) -> bool:
    return mask.dim() < len(shape) and mask.shape == shape[: mask.dim()]


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and _covers(mask, x.shape):
        x = x[mask]
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
