"""Raw sums over a batch and the Kronecker factors they make."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.extra import ExtraStatistic


class KroneckerFactors(NamedTuple):
    """F ≈ A ⊗ G of one layer, symmetric and positive semi-definite.

    Attributes:
        A: second moment of the inputs (in[+1], in[+1]), the bias last. (groups, in[+1], in[+1]) for a layer in groups;
            the diagonal (in,) for an embedding; ones for a norm layer; a vector that `InputFactors.of` reads for a
            doubly factored layer.
        G: second moment of the gradients at the outputs (out, out), or (groups, out, out). For a norm layer that of
            the gradients of its parameters.
    """

    A: Tensor
    G: Tensor


@dataclass(frozen=True)
class ScaledSums:
    """Fresh factors of one layer before their normalisation: A = A_scale · A_sum and G = G_scale · G_sum.

    The running average multiplies by another constant anyway, so a pass over the sums is saved by leaving this to it.

    Attributes:
        A_sum: Σ ā āᵀ; whoever gets it may overwrite it.
        G_sum: Σ g gᵀ, likewise.
        A_scale: 1/M, or 1/R where whole examples count.
        G_scale: 1/R, or 1/M.
        extra: further sums by name, each with its scale.
    """

    A_sum: Tensor
    G_sum: Tensor
    A_scale: float
    G_scale: float
    extra: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)


@dataclass
class LayerStatistics:
    """Raw sums of one layer.

    Attributes:
        A_sum: Σ ā āᵀ over the shared positions.
        G_sum: Σ g gᵀ over the shared positions, g = d(-log p)/ds of each example; averaged over draws for
            fisher="mc".
        positions: how many shared positions, R.
        reduced: whether the rows are those of whole examples (sharing="reduce"); `positions` counts these then.
        extra: further sums by name, see `ExtraStatistic`.
    """

    A_sum: Tensor
    G_sum: Tensor
    positions: float
    reduced: bool = False
    extra: dict[str, Tensor] = field(default_factory=dict)

    def counts(self, terms: float) -> tuple[float, float]:
        """What to divide A_sum and G_sum by, for a loss averaged over `terms` terms."""
        return (self.positions, terms) if self.reduced else (terms, self.positions)

    def add(self, other: LayerStatistics) -> None:
        """Add sums in place."""
        self.A_sum.add_(other.A_sum)
        self.G_sum.add_(other.G_sum)
        self.positions += other.positions
        # What was not taken of all examples says nothing about their mean.
        self.extra = {name: total.add_(other.extra[name]) for name, total in self.extra.items() if name in other.extra}


@dataclass
class Pending:
    """Statistics of everything recorded since the last step.

    Attributes:
        layers: sums by layer name; a layer that was not used, or did not influence the output, is absent.
        terms: how many terms a mean-reduced loss averages over, M.
        examples: how many examples were seen.
        adapters: of all layers that are watched, in the order in which process groups exchange them.
        watched: the further statistics of each layer, by layer name and name.
        bare: layers of which A and G are not wanted; their sums of these have no rows.
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    terms: float = 0
    examples: float = 0
    adapters: Mapping[str, LayerAdapter] = field(default_factory=dict, repr=False)
    watched: Mapping[str, Mapping[str, ExtraStatistic]] = field(default_factory=dict, repr=False)
    bare: Collection[str] = ()

    def add(self, layers: Mapping[str, LayerStatistics], terms: float, examples: float) -> None:
        """Add the sums of one forward; the tensors may be taken over.

        Args:
            layers: sums by layer name.
            terms: M of the forward.
            examples: N of the forward.
        """
        for name, statistics in layers.items():
            if name in self.layers:
                self.layers[name].add(statistics)
            else:
                self.layers[name] = statistics
        self.terms += terms
        self.examples += examples

    def factors(self) -> dict[str, KroneckerFactors]:
        """A = (1/M) Σ ā āᵀ and G = (1/R) Σ g gᵀ, or A = (1/R) Σ ā āᵀ and G = (1/M) Σ g gᵀ over whole examples.

        M is how many terms a mean-reduced loss averages over, R how many positions the layer saw, and g = d(-log p)/ds
        of a single example: neither the batch size nor the reduction of the loss is in the factors.

        Returns:
            New tensors by layer name; empty when nothing was recorded or every term was masked.
        """
        return {
            name: KroneckerFactors(layer.A_sum / inputs, layer.G_sum / outputs)
            for name, layer, inputs, outputs in self._recorded()
            if name not in self.bare
        }

    def scaled_sums(self) -> dict[str, ScaledSums]:
        """What `factors` returns, by layer name, with the multiplication left to the caller."""
        return {
            name: ScaledSums(layer.A_sum, layer.G_sum, 1 / inputs, 1 / outputs, self._extra(name, layer))
            for name, layer, inputs, outputs in self._recorded()
        }

    def _extra(self, name: str, layer: LayerStatistics) -> dict[str, tuple[Tensor, float]]:
        counts = {"terms": self.terms, "positions": layer.positions}
        return {key: (total, 1 / counts[self.watched[name][key].per]) for key, total in layer.extra.items()}

    def _recorded(self) -> Iterator[tuple[str, LayerStatistics, float, float]]:
        """Layers that saw anything: name, sums, and what A and G are divided by."""
        for name, layer in self.layers.items():
            if self.terms > 0 and layer.positions > 0:
                yield name, layer, *layer.counts(self.terms)

    def finite(self) -> bool:
        """Whether no sum holds NaN or infinity. One host synchronisation."""
        # A non-finite entry of a row reaches the diagonal, a sum of squares, of its second moment: the traces tell.
        traces = [diagonal(t).sum() for s in self.layers.values() for t in (s.A_sum, s.G_sum)]
        traces += [t.sum(dtype=torch.float64) for s in self.layers.values() for t in s.extra.values()]
        if not traces:
            return True
        home = traces[0].device
        return bool(torch.stack([t.to(home, torch.float64, non_blocking=True) for t in traces]).isfinite().all())

    def all_reduce(self) -> None:
        """Sum everything over the default process group, in place; every rank must call it.

        Ranks may have seen different layers, or nothing at all. Without a process group, or with one rank, nothing
        happens.
        """
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return
        if not self.adapters:
            return
        empty = LayerStatistics(torch.empty(0), torch.empty(0), 0)
        entries = [self.layers.get(name, empty) for name in self.adapters]
        home = next(iter(self.adapters.values())).weight.device
        watched = [(name, key) for name, some in self.watched.items() for key in some]
        counts = torch.tensor(
            [
                self.terms,
                self.examples,
                *(e.positions for e in entries),
                *(float(n in self.layers) for n in self.adapters),
                *(float(n in self.layers and key not in self.layers[n].extra) for n, key in watched),
            ],
            dtype=torch.float64,
        ).to(home)
        distributed.all_reduce(counts)
        self.terms, self.examples, *rest = counts.tolist()
        positions, holders, gaps = rest[: len(entries)], rest[len(entries) : 2 * len(entries)], rest[2 * len(entries) :]
        # Ranks that did not see a layer have zeros of it; one that saw it without the statistic spoils the mean.
        partial = {pair for pair, ranks in zip(watched, gaps, strict=True) if ranks > 0}

        # Only the layers that some rank has; all ranks know these now, so the buffers agree.
        names = [name for name, ranks in zip(self.adapters, holders, strict=True) if ranks > 0]
        buffers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for name, count in zip(self.adapters, positions, strict=True):
            if name not in names:
                continue
            if name not in self.layers:
                self.layers[name] = _zeros(self.adapters[name], bare=name in self.bare)
            layer, adapter = self.layers[name], self.adapters[name]
            layer.positions = count
            layer.extra = {
                key: layer.extra[key] if key in layer.extra else _empty(statistic.shape, adapter)
                for key, statistic in self.watched.get(name, {}).items()
                if (name, key) not in partial
            }
            for tensor in (layer.A_sum, layer.G_sum, *layer.extra.values()):
                buffers.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for tensors in buffers.values():
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            distributed.all_reduce(flat)
            for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
        self.layers = {name: self.layers[name] for name in names}


def factor_shapes(adapter: LayerAdapter, bare: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and G of a layer; where they are not wanted they have no rows, and their sizes as columns."""
    inputs, outputs = adapter.factor_sizes
    return ((0, inputs), (0, outputs)) if bare else adapter.factor_shapes


def no_factors(adapter: LayerAdapter) -> tuple[Tensor, Tensor]:
    """A and G of a layer of which they are not wanted."""
    A, G = (_empty(shape, adapter) for shape in factor_shapes(adapter, bare=True))
    return A, G


def _zeros(adapter: LayerAdapter, *, bare: bool) -> LayerStatistics:
    A, G = (_empty(shape, adapter) for shape in factor_shapes(adapter, bare))
    return LayerStatistics(A, G, 0, adapter.reduces)


def _empty(shape: tuple[int, ...], adapter: LayerAdapter) -> Tensor:
    return torch.zeros(shape, dtype=adapter.factor_dtype, device=adapter.weight.device)


def diagonal(factor: Tensor) -> Tensor:
    """The diagonal of a factor or of each group's, flat; a diagonal factor is its own."""
    if factor.dim() == 2:
        return factor.diagonal()
    return factor if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1).flatten()
