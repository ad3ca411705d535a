"""Rows of inputs and gradients position by position, and what is made of them for single examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.extra import ExtraStatistic
from kronfac.curvature.forward import Call
from kronfac.ops import second_moment_

CHUNK = 1 << 20
"""Numbers that the rows, or the gradients, of the examples handled at a time may have: 4 MiB of float32."""

ACCELERATOR_CHUNK = 1 << 24
"""The same on an accelerator, where a chunk is several launches, and 64 MiB are little."""


class Pairs(NamedTuple):
    """What some examples saw at each shared position, and the gradient there.

    Attributes:
        x: inputs without the bias's one (examples, positions, in), or (examples, groups, positions, in).
        g: gradients (examples, positions, out), or with the groups likewise.
    """

    x: Tensor
    g: Tensor


def chunks(call: Call, g: Tensor) -> Iterator[Pairs]:
    """The rows of a call, some examples at a time, in the layer's `factor_dtype`.

    Args:
        call: of a layer whose adapter `has_pairs`.
        g: as in `ExtraStatistic.add`.
    """
    x, mask = call.inputs, call.mask
    if call.swapped:  # examples second, and the layer's own statistics did not mind
        x, g = x.transpose(0, 1), g.transpose(0, 1)
        mask = mask.transpose(0, 1) if mask is not None and mask.dim() > 1 else None
    inputs, outputs = call.adapter.factor_sizes
    for rows in call.adapter.pairs(x, g, mask, max(_chunk(g) // call.adapter.groups // max(inputs, outputs), 1)):
        wide = call.adapter.factor_dtype
        yield Pairs(rows[0].to(wide), rows[1].to(wide))


def gradients(pairs: Pairs, bias: bool) -> Iterator[Tensor]:
    """Per-example gradients Σ_t g_t [x_t 1]ᵀ (some examples, out, in[+1]), or (some examples, groups, out, in[+1])."""
    size = pairs.g.shape[-1] * (pairs.x.shape[-1] + 1) * pairs.g.shape[1 : pairs.g.dim() - 2].numel()
    step = max(_chunk(pairs.g) // max(size, 1), 1)
    for x, g in zip(torch.split(pairs.x, step), torch.split(pairs.g, step), strict=True):
        products = g.mT @ x
        yield torch.cat([products, g.sum(-2).unsqueeze(-1)], -1) if bias else products


class SquaredGradients(ExtraStatistic):
    """Σ over examples of the squared gradient of W: M times the diagonal of the layer's Fisher block.

    Args:
        adapter: of the layer.
    """

    def __init__(self, adapter: LayerAdapter) -> None:
        super().__init__(adapter.matrix_shape)

    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """See `ExtraStatistic.add`."""
        adapter = call.adapter
        if out is None:
            out = torch.zeros(self.shape, dtype=adapter.factor_dtype, device=g.device)
        for pairs in chunks(call, g):
            if adapter.groups == 1:
                second_moment_(out, pairs.g, pairs.x, bias=adapter.has_bias, decay=1.0, scale=scale)
                continue
            for each in gradients(pairs, adapter.has_bias):
                out.add_(each.square_().sum(0), alpha=scale)
        return out


class RotatedSquares(ExtraStatistic):
    """Σ over examples of (Q_Gᵀ (gradient of W) Q_A)², squared elementwise: EKFAC's eigenvalues.

    Args:
        adapter: of the layer.

    Attributes:
        left: Q_G (out, out), with the groups in front where there are some; None before the first basis, when the
            statistic is not available.
        right: Q_A (in[+1], in[+1]), likewise.
    """

    def __init__(self, adapter: LayerAdapter) -> None:
        super().__init__(adapter.matrix_shape)
        self.left: Tensor | None = None
        self.right: Tensor | None = None
        self.available = False

    def rotate(self, left: Tensor | None, right: Tensor | None) -> None:
        """Take the coming statistics in another basis."""
        self.left, self.right = left, right
        self.available = left is not None

    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """See `ExtraStatistic.add`."""
        assert self.left is not None
        assert self.right is not None
        adapter, left, right = call.adapter, self.left, self.right
        if out is None:
            out = torch.zeros(self.shape, dtype=adapter.factor_dtype, device=g.device)
        for pairs in chunks(call, g):
            rotated = _times(pairs.g, left)
            # Rotating each position's input costs positions · in², each example's gradient out · in².
            if adapter.groups == 1 and pairs.x.shape[1] <= adapter.out_features:
                inputs = _times(pairs.x, right[: adapter.in_features])
                if adapter.has_bias:
                    inputs += right[-1]
                second_moment_(out, rotated, inputs, decay=1.0, scale=scale)
                continue
            for each in gradients(Pairs(pairs.x, rotated), adapter.has_bias):
                out.add_((each @ right).square_().sum(0), alpha=scale)
        return out


def _chunk(like: Tensor) -> int:
    return CHUNK if like.is_cpu else ACCELERATOR_CHUNK


def _times(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows (examples, [groups,] positions, features) times ([groups,] features, more), whatever their layout."""
    if rows.is_contiguous() or rows.dim() == 4:
        return rows @ basis
    # The rows of maps lie with the positions last; so do those of the result, and nothing is copied.
    return (basis.mT.expand(len(rows), -1, -1) @ rows.mT).mT
