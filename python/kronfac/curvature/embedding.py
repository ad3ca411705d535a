"""Embeddings: a linear layer on one-hot vectors that are never formed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from kronfac.curvature.adapter import LayerAdapter, accumulate
from kronfac.curvature.registry import register_adapter
from kronfac.curvature.sharing import SHARINGS, count, covers, example_rows, rows


@register_adapter(nn.Embedding)
class EmbeddingAdapter(LayerAdapter):
    """`torch.nn.Embedding` as W times a one-hot vector, W (embedding_dim, num_embeddings).

    A is diagonal, the frequency of each index, and kept as a vector. With sharing="reduce" the mean one-hot vector of
    an example holds the share of each index, and the diagonal of its second moment is kept. Positions that hold
    `padding_idx`, whose row has no gradient, count nowhere.
    """

    block = "diagonal_input"
    sharings = SHARINGS
    leading_positions = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.in_features, self.out_features = self._embedding.num_embeddings, self._embedding.embedding_dim

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Dense gradients that are those of a linear layer: not rescaled by frequency, rows not renormalised."""
        assert isinstance(module, nn.Embedding)
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return super().supports(module) and plain

    @property
    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.module)

    def restrict(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The positions that hold no padding, among those that the mask leaves."""
        if self._embedding.padding_idx is None:
            return mask
        kept = x != self._embedding.padding_idx
        if mask is not None and covers(mask, torch.Size((*x.shape, 1))):
            kept &= mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
        return kept

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Counts of each index of x (*); see `LayerAdapter.input_statistics`."""
        x = x.unsqueeze(-1)
        if out is None:
            out = torch.zeros(self.in_features, dtype=self.factor_dtype, device=x.device)
        if not self.reduces:
            indices = rows(x, mask).flatten()
            return out.index_add_(0, indices, torch.ones_like(indices, dtype=out.dtype))
        if mask is None or not covers(mask, x.shape):
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        examples = x.shape[0] if x.dim() > 1 else 1
        kept = mask.reshape(*mask.shape, *[1] * (x.dim() - 1 - mask.dim())).expand(x.shape[:-1]).reshape(examples, -1)
        # An index counts where it comes first in its sorted row; what the mask leaves out comes last. Unlike unique
        # this does not wait for the device.
        indices = torch.where(kept, x.reshape(examples, -1), self.in_features).sort(1).values
        first = torch.searchsorted(indices, indices)
        often = (torch.searchsorted(indices, indices, right=True) - first).to(out.dtype)
        counts = (first == torch.arange(indices.shape[1], device=x.device)) & (indices < self.in_features)
        shares = torch.where(counts, often / kept.sum(1, keepdim=True).to(out.dtype), 0.0)
        return out.index_add_(0, indices.clamp(max=self.in_features - 1).flatten(), shares.square().flatten())

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Σ over the rows of g (*, embedding_dim); see `LayerAdapter.output_statistics`."""
        g = example_rows(g, mask, mean=False) if self.reduces else rows(g, mask)
        return accumulate(out, g, False, scale)

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """Rows of the output that the mask leaves."""
        return count(shape, mask, self.reduces)

    def _split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (matrix.mT,)

    def _matrix(self, parts: list[Tensor]) -> Tensor:
        return parts[0].mT
