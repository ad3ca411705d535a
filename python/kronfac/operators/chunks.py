"""Cuts batches into chunks of examples whose graphs fit into memory."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronfac.operators.data import Batch, DataSource, example_count, leaves
from kronfac.operators.memory import Usage

# Examples that are measured first, how many times as many next, and the gain for which no more are measured.
_FIRST, _GROWTH, _GAIN = 2, 3, 1.1


class _Cost:
    """Bytes that graphs of examples of one shape take, as far as they were measured.

    At each moment of a product so much is alive for every example and so much besides, a + b·n. The peak is the largest
    of these lines, and so convex in n: between two measured sizes it lies below their chord, beyond them below the
    proportional, and above the line through the last two.
    """

    def __init__(self) -> None:
        self.measured: dict[int, Usage] = {}

    def peak(self, examples: int) -> float:
        """A bound of the peak from above."""
        return _bound({size: usage.peak for size, usage in self.measured.items()}, examples)

    def kept(self, examples: int) -> float:
        """The same of what a graph holds between products."""
        return _bound({size: usage.kept for size, usage in self.measured.items()}, examples)

    def within(self, limit: int) -> int:
        """The most examples that were measured not to exceed the limit; 0 for none."""
        return max((size for size, usage in self.measured.items() if usage.peak <= limit), default=0)

    def beyond(self, limit: int) -> int | None:
        """The fewest that were measured to exceed it."""
        return min((size for size, usage in self.measured.items() if usage.peak > limit), default=None)

    def guess(self, limit: int) -> int:
        """How many may fit, by the line through the last two sizes; one size tells no line, only a bound."""
        sizes = sorted(self.measured)
        last = self.measured[sizes[-1]].peak
        if len(sizes) == 1:
            return int(sizes[0] * limit / last)
        slope = (last - self.measured[sizes[-2]].peak) / (sizes[-1] - sizes[-2])
        return sizes[-1] + int((limit - last) / slope) if slope > 0 else sizes[-1] * _GROWTH


def _bound(values: Mapping[int, int], examples: int) -> float:
    below = max((size for size in values if size <= examples), default=None)
    above = min((size for size in values if size >= examples), default=None)
    if above is None:
        assert below is not None
        return values[below] * examples / below
    if below is None or below == above:
        return values[above]
    return values[below] + (values[above] - values[below]) * (examples - below) / (above - below)


class Chunker:
    """Decides how many examples a graph may hold, and cuts.

    Args:
        source: of the batches.
        chunk_size: the most examples of a chunk; None for as many as memory allows, or all.
        memory_limit: the most bytes of tensors that the graphs and a product with them may hold at once; None: any.
        measure: what building the graph of a batch and one product with it take.
        caller: the public function that error messages name.
    """

    def __init__(
        self,
        source: DataSource,
        chunk_size: int | None,
        memory_limit: int | None,
        measure: Callable[[Batch], Usage],
        caller: str,
    ) -> None:
        self._source = source
        self._chunk_size = chunk_size
        self._limit = memory_limit
        self._measure = measure
        self._caller = caller
        self._costs: dict[Any, _Cost] = {}
        self._expected: dict[tuple[int, int], tuple[float, float]] = {}

    @property
    def cuts(self) -> bool:
        """Whether batches may come in several pieces."""
        return self._chunk_size is not None or self._limit is not None

    def pieces(self, batch: Batch) -> list[Batch]:
        """The chunks of a batch, of sizes that differ by at most one example; the batch itself where it fits.

        Raises:
            ValueError: a single example takes more memory than is allowed; the batch cannot be cut, or `batch_size`
                does not add up over its examples.
        """
        if not self.cuts:
            return [batch]
        examples = self._examples(batch)
        largest = self._largest(batch, examples)
        count = math.ceil(examples / largest) if largest else 1
        edges = [examples * part // count for part in range(count + 1)]
        if self._limit is not None:
            cost = self._cost(batch)
            for part, (low, high) in enumerate(pairwise(edges)):
                self._expected[batch.number, part] = cost.peak(high - low), cost.kept(high - low)
        if count == 1:
            return [batch]
        pieces = [self.take(batch, slice(low, high), part) for part, (low, high) in enumerate(pairwise(edges))]
        self.refuse_uneven(batch, pieces)
        return [piece for piece in pieces if piece.size > 0]

    def fits(self, pieces: list[Batch]) -> list[Batch]:
        """Those of all pieces, in order, whose graphs may be kept within the memory limit: all, or the first ones."""
        assert self._limit is not None
        expected = [self._expected[piece.number, piece.part] for piece in pieces]
        everything = sum(kept for _, kept in expected)
        if everything + max((peak - kept for peak, kept in expected), default=0.0) <= self._limit:
            return pieces
        spare = self._limit - max(peak for peak, _ in expected)
        found = []
        for piece, (_, kept) in zip(pieces, expected, strict=True):
            spare -= kept
            if spare < 0:
                break
            found.append(piece)
        return found

    def sample(self, batch: Batch) -> tuple[Batch, list[Batch]]:
        """Some examples from all over a batch, as many as a chunk holds, in one piece and in two unequal ones."""
        examples = self._examples(batch)
        count = min(examples, max(2, self._largest(batch, examples)))
        chosen = torch.arange(count) * examples // count
        whole = self.take(batch, chosen, 0)
        # Cut from the batch, not from `whole`: which tensors hold examples is told by the number of all.
        pieces = [self.take(batch, some, part) for part, some in enumerate(chosen.tensor_split([max(1, count // 3)]))]
        self.refuse_uneven(whole, pieces)
        return whole, [piece for piece in pieces if piece.size > 0]

    def take(self, batch: Batch, which: slice | Tensor, part: int) -> Batch:
        """Some examples of a batch, which must be as it came, as a batch."""
        examples = self._examples(batch)
        inputs, targets = (self._cut(tree, which, examples) for tree in (batch.inputs, batch.targets))
        return Batch(inputs, targets, self._source.size(inputs, targets), batch.number, part)

    def refuse_uneven(self, batch: Batch, pieces: list[Batch]) -> None:
        """Refuse a `batch_size` that does not add up over examples.

        Raises:
            ValueError: the pieces do not count as much as the batch.
        """
        total = sum(piece.size for piece in pieces)
        if abs(total - batch.size) > 1e-4 * max(abs(total), abs(batch.size)):
            raise ValueError(
                f"{self._caller}: batch_size: batch {batch.number} counts for {batch.size:g}, its chunks for {total:g} "
                "together; to be cut, what a batch counts for must be a sum over its examples"
            )

    def _largest(self, batch: Batch, examples: int) -> int:
        wanted = examples if self._chunk_size is None else min(self._chunk_size, examples)
        if self._limit is None:
            return wanted
        cost, limit = self._cost(batch), self._limit

        def probe(size: int) -> None:
            part = batch if size == examples else self.take(batch, slice(0, size), 0)
            cost.measured[size] = self._measure(part)

        if not cost.measured:
            probe(min(_FIRST, examples))
        if not cost.within(limit) and 1 not in cost.measured:
            probe(1)
        while known := cost.within(limit):
            if known >= wanted or cost.peak(wanted) <= limit:
                return wanted
            safe = _last(range(known, wanted), lambda size: cost.peak(size) <= limit)
            size = min(wanted, known * _GROWTH, cost.guess(limit))
            settled = cost.beyond(limit) is not None or (len(cost.measured) > 1 and size <= _GAIN * safe)
            if settled or size <= known:
                return safe
            probe(size)
        raise ValueError(
            f"{self._caller}: memory_limit: one example of batch {batch.number} takes {cost.peak(1):.3g} bytes, "
            f"expected at most {limit}; raise the limit, or choose fewer parameters"
        )

    def _cost(self, batch: Batch) -> _Cost:
        return self._costs.setdefault(self._signature(batch, self._examples(batch)), _Cost())

    def _examples(self, batch: Batch) -> int:
        count = example_count(batch.inputs)
        if count is None:
            raise ValueError(
                f"{self._caller}: chunk_size, memory_limit: batch {batch.number} cannot be cut: its inputs hold no "
                "tensor with a leading dimension; pass smaller batches as a list"
            )
        return count

    def _signature(self, batch: Batch, examples: int) -> Any:
        """What two batches have in common whose examples take the same memory."""
        return tuple(
            (leaf.dtype, tuple(leaf.shape[1:]) if _has_examples(leaf, examples) else tuple(leaf.shape))
            for leaf in leaves((batch.inputs, batch.targets))
            if isinstance(leaf, Tensor | np.ndarray)
        )

    def _cut(self, tree: Any, which: slice | Tensor, examples: int) -> Any:
        if isinstance(tree, Tensor | np.ndarray):
            if not _has_examples(tree, examples):
                return tree
            if isinstance(tree, Tensor):
                return tree[which] if isinstance(which, slice) else tree[which.to(tree.device)]
            return tree[which if isinstance(which, slice) else which.numpy()]
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return type(tree)(*(self._cut(value, which, examples) for value in tree))
        if isinstance(tree, tuple | list):
            return type(tree)(self._cut(value, which, examples) for value in tree)
        if isinstance(tree, Mapping):
            items = {key: self._cut(value, which, examples) for key, value in tree.items()}
            try:
                return type(tree)(items)  # type: ignore[call-arg]
            except TypeError:
                return items
        if tree is None or isinstance(tree, bool | int | float | complex | str | bytes):
            return tree
        raise ValueError(
            f"{self._caller}: chunk_size, memory_limit: a batch holds a {type(tree).__name__}, which cannot be cut "
            "into examples; pass smaller batches as a list"
        )


def _has_examples(leaf: Any, examples: int) -> bool:
    return bool(leaf.ndim > 0 and leaf.shape[0] == examples)


def _last(sizes: range, holds: Callable[[int], bool]) -> int:
    """The last of some sizes up to which something holds; it does for the first."""
    return sizes[bisect.bisect_left(sizes, True, key=lambda size: not holds(size)) - 1]
