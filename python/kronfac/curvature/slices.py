"""Second moments of the rows and columns of per-example gradients, slice by slice of a layer's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.extra import ExtraStatistic
from kronfac.curvature.forward import Call
from kronfac.curvature.pairs import Pairs, chunks, gradients

MEMORY = 4
"""How many times the numbers in A and G the moments of all slices of a layer may have."""


def slices_of(outputs: int, inputs: int) -> int:
    """Into how many slices of equal height a layer's rows are cut.

    As many as divide `outputs` and need at most `MEMORY` times the memory of A and G: many for a layer with more
    outputs than inputs, few for one with many inputs, one where nothing else fits.
    """
    limit = MEMORY * (inputs**2 + outputs**2)
    divisors = (n for n in range(outputs, 0, -1) if outputs % n == 0)
    return next((n for n in divisors if n * (inputs**2 + (outputs // n) ** 2) <= limit), 1)


class SliceMoments(ExtraStatistic):
    """Σ over examples of M_s M_sᵀ and M_sᵀ M_s, M_s (rows, in[+1]) the rows of a slice s of an example's gradient.

    Both moments of a slice lie in one row of the sum, (slices, rows² + (in[+1])²), or (groups, slices, ...), because
    they are made together; `split` takes them apart.

    Args:
        adapter: of the layer.

    Attributes:
        slices: how many.
    """

    def __init__(self, adapter: LayerAdapter) -> None:
        inputs, outputs = adapter.factor_sizes
        self.slices = slices_of(outputs, inputs)
        row = (self.slices, (outputs // self.slices) ** 2 + inputs**2)
        super().__init__(row if adapter.groups == 1 else (adapter.groups, *row))

    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """See `ExtraStatistic.add`."""
        adapter = call.adapter
        inputs, outputs = adapter.factor_sizes
        if out is None:
            out = torch.zeros(self.shape, dtype=adapter.factor_dtype, device=g.device)
        rows, columns = split(out, outputs // self.slices, inputs)
        for pairs in chunks(call, g):
            # Products of gradients cost out · in², those of inputs slices · positions · in².
            if adapter.groups == 1 and pairs.x.shape[1] * self.slices < outputs:
                self._add_by_positions(rows, columns, pairs, adapter.has_bias, scale)
                continue
            for each in gradients(pairs, adapter.has_bias):
                # (groups · slices, examples · rows, in) and (groups · slices, rows, examples · in)
                blocks = each.reshape(len(each), -1, outputs // self.slices, inputs).transpose(0, 1)
                tall = blocks.reshape(len(blocks), -1, inputs)
                wide = blocks.transpose(1, 2).reshape(len(blocks), outputs // self.slices, -1)
                columns.add_((tall.mT @ tall).view(columns.shape), alpha=scale)
                rows.add_((wide @ wide.mT).view(rows.shape), alpha=scale)
        return out

    def _add_by_positions(self, rows: Tensor, columns: Tensor, pairs: Pairs, bias: bool, scale: float) -> None:
        """M_s = g_sᵀ x, so that M_sᵀ M_s = xᵀ (g_s g_sᵀ) x: without the gradients themselves."""
        x, g = pairs
        if bias:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
        inputs = x.reshape(-1, x.shape[-1])
        between = x @ x.mT
        for index, some in enumerate(g.chunk(self.slices, -1)):
            weighted = (some @ some.mT) @ x
            columns[index].addmm_(inputs.mT, weighted.reshape(inputs.shape), alpha=scale)
            flat = some.reshape(-1, some.shape[-1])
            rows[index].addmm_(flat.mT, (between @ some).reshape(flat.shape), alpha=scale)


def split(moments: Tensor, rows: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Views (..., slices, rows, rows) and (..., slices, in, in) of what `SliceMoments` sums."""
    first, second = torch.split_with_sizes(moments, [rows**2, inputs**2], -1)
    front = moments.shape[:-1]
    return first.view(*front, rows, rows), second.view(*front, inputs, inputs)
