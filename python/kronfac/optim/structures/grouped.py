"""Layers in groups: one Fisher block per group, inverted and applied by any structure as blocks of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronfac.curvature import ExtraStatistic, GradientRows, LayerAdapter
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, Structure


class Grouped:
    """A structure for layers with and without groups.

    The factors, matrices and factorisations of a layer in groups carry the groups in front; the inner structure sees
    each group as a layer.

    Args:
        inner: how one block is inverted and applied.
    """

    def __init__(self, inner: Structure) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """That of the inner structure."""
        return self.inner.name

    @property
    def needs_factors(self) -> bool:
        """That of the inner structure."""
        return self.inner.needs_factors

    @property
    def by_rows(self) -> bool:
        """That of the inner structure; only layers without groups have rows."""
        return self.inner.by_rows

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Those of one block."""
        return self.inner.shapes(outputs, inputs)

    def statistics(self, adapter: LayerAdapter) -> Mapping[str, ExtraStatistic]:
        """See `Structure.statistics`; the inner structure shapes them for all groups at once."""
        return self.inner.statistics(adapter)

    def renew(self, statistics: Mapping[str, ExtraStatistic], factorisation: Factorisation | None) -> None:
        """See `Structure.renew`."""
        self.inner.renew(statistics, factorisation)

    def carry(self, averages: Averages, old: Factorisation | None, new: Factorisation) -> Mapping[str, Tensor]:
        """See `Structure.carry`; the inner structure takes tensors with groups in front."""
        return self.inner.carry(averages, old, new)

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`. A layer counts as inverted when all of its groups are."""
        counts = [len(pair.G) if pair.G.dim() == 3 else 0 for pair in factors]
        if not any(counts):
            return self.inner.factorise(factors, damping)
        blocks: list[Averages] = []
        for pair, count in zip(factors, counts, strict=True):
            if count:
                extra = {key: tensor.unbind() for key, tensor in pair.extra.items()}
                blocks += (
                    Averages(pair.A[group], pair.G[group], {key: parts[group] for key, parts in extra.items()})
                    for group in range(count)
                )
            else:
                blocks.append(pair)
        done = self.inner.factorise(blocks, _repeat(damping, counts))
        values: list[Factorisation | None] = []
        start = 0
        for count in counts:
            some = done.values[start : start + max(count, 1)]
            start += len(some)
            whole = [value for value in some if value is not None]
            if len(whole) < len(some):
                values.append(None)
            elif count:
                values.append({key: torch.stack([value[key] for value in whole]) for key in whole[0]})
            else:
                values.append(some[0])
        return Factorised(values, done.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        counts = [len(grad) if grad.dim() == 3 else 0 for grad in grads]
        if not any(counts):
            return self.inner.apply(grads, factorisations, damping)
        matrices: list[Tensor] = []
        blocks: list[Factorisation] = []
        for grad, factorisation, count in zip(grads, factorisations, counts, strict=True):
            if not count:
                matrices.append(grad)
                blocks.append(factorisation)
                continue
            matrices += grad.unbind()
            parts = {key: tensor.unbind() for key, tensor in factorisation.items()}
            blocks += ({key: tensors[group] for key, tensors in parts.items()} for group in range(count))
        out, dots = self.inner.apply(matrices, blocks, _repeat(damping, counts))
        sizes = [max(count, 1) for count in counts]
        results: list[Tensor] = []
        start = 0
        for count, size in zip(counts, sizes, strict=True):
            results.append(torch.stack(out[start : start + count]) if count else out[start])
            start += size
        return results, torch.stack([part.sum() for part in torch.split_with_sizes(dots, sizes)])

    def apply_rows(self, rows: GradientRows, factorisation: Factorisation) -> tuple[Tensor, Tensor]:
        """See `Structure.apply_rows`."""
        return self.inner.apply_rows(rows, factorisation)


def _repeat(values: Sequence[float], counts: Sequence[int]) -> list[float]:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(max(count, 1))]
