"""Shared positions: which of them count, and how they are reduced to one row per example."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.masks import chosen, number, of_examples

SHARINGS = ("expand", "reduce")


def set_sharing(name: str, adapter: LayerAdapter, sharing: str) -> None:
    """Say how the positions of a shared layer enter its statistics.

    Raises:
        ValueError: the layer's adapter does not follow `sharing`.
    """
    if sharing not in adapter.sharings:
        raise ValueError(
            f"kronfac: sharing: layer {name!r}: {type(adapter).__name__} follows "
            f"{', '.join(map(repr, adapter.sharings))}, got {sharing!r}; give the layer's parameters a param group "
            "with another sharing, or list it in the adapter's `sharings` once its statistics follow it"
        )
    adapter.sharing = sharing


def covers(mask: Tensor, shape: torch.Size) -> bool:
    """Whether the leading dimensions of a tensor (*, features) begin with the mask's shape."""
    return mask.dim() < len(shape) and mask.shape == shape[: mask.dim()]


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """All positions of x (*, features) that the mask leaves, as rows."""
    if mask is not None and covers(mask, x.shape):
        x = chosen(x, mask)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def count(shape: torch.Size, mask: Tensor | None, reduces: bool) -> int:
    """How many rows `rows`, or `example_rows` where the layer reduces, makes of a tensor (*, features)."""
    if mask is not None and not covers(mask, shape):
        mask = None
    if reduces:
        examples = shape[0] if len(shape) > 1 else 1
        return examples if mask is None else number(of_examples(mask))
    if mask is None:
        return math.prod(shape[:-1])
    return number(mask) * math.prod(shape[mask.dim() : -1])


def example_rows(x: Tensor, mask: Tensor | None, *, mean: bool) -> Tensor:
    """One row per example of x (examples, *, features): the mean or the sum over its positions.

    Args:
        x: (examples, *, features); a vector is one example.
        mask: bool; positions that are False are left out, and so is an example of which nothing is left.
        mean: divide by the number of positions.

    Returns:
        (examples, features) in the dtype that sums of x are formed in, float32 for half precision.
    """
    if x.dim() == 1:
        x = x.unsqueeze(0)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if mask is None or not covers(mask, x.shape):
        if x.dim() == 2:
            return x
        middle = list(range(1, x.dim() - 1))
        return x.mean(middle, dtype=dtype) if mean else x.sum(middle, dtype=dtype)
    left = of_examples(mask)
    x, mask = chosen(x, left), chosen(mask, left)
    weights = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
    # where and not a product: what is masked may be infinite.
    kept = torch.where(weights, x, torch.zeros((), dtype=x.dtype, device=x.device))
    if x.dim() == 2:
        return kept
    middle = list(range(1, x.dim() - 1))
    sums = kept.sum(middle, dtype=dtype)
    if not mean:
        return sums
    positions = weights.expand(*x.shape[:-1], 1).sum(middle)
    return sums / positions
