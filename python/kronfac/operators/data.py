"""The data an operator averages over: one batch, a list of batches, or a loader that is read for every product."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

BatchSize = Callable[[Any, Any], float]
"""Called as batch_size(inputs, targets): how many examples (or loss terms) a batch counts for."""

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# Words hashed at a time: bounds the scratch memory to a few tens of MB.
_CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch and how much it counts.

    Attributes:
        inputs: a tensor, a tuple or list (passed as positional arguments) or a dict (keyword arguments).
        targets: whatever the loss takes as its second argument.
        size: number of examples.
        number: of the batch in a pass.
        part: of the chunk within a batch that was cut.
    """

    inputs: Any
    targets: Any
    size: float
    number: int
    part: int = 0


class DataSource:
    """Batches that are the same in every pass, or an error.

    Args:
        data: a batch (inputs, targets), a list of batches, or a re-iterable such as a DataLoader that does not shuffle.
        batch_size: how many examples a batch counts for (default: the leading dimension of its first input).
        caller: the public function that error messages name.
        empty: accept data without examples (another process has them).

    Attributes:
        fixed: the batches are held in memory, so that a graph built on them can be kept.
        single: there is exactly one batch.
        total: examples in all.
        count: batches, with those that are empty.

    Raises:
        TypeError, ValueError: data of another form, a shuffling sampler, a one-shot iterator, no examples.
    """

    def __init__(self, data: Any, batch_size: BatchSize | None, caller: str, *, empty: bool = False) -> None:
        self.caller = caller
        self._batch_size = batch_size
        self._data, self.fixed = _normalise(data, caller)
        if isinstance(self._data, DataLoader):
            _refuse_random_sampler(self._data, caller)
            _refuse_repeating_sampler(self._data, caller)
        self._fingerprints: list[Any] | None = None
        sizes: list[float] = []
        fingerprints: list[Any] = []
        for inputs, targets in self._pairs():
            sizes.append(self.size(inputs, targets))
            fingerprints.append(self._fingerprint(inputs, targets))
        self._fingerprints = fingerprints
        self.total = sum(sizes)
        self.count = len(sizes)
        self.single = self.count == 1
        if self.total <= 0 and not empty:
            raise ValueError(f"{caller}: data: expected at least one example, got {len(sizes)} batches without any")

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Read all batches once, numbered, skipping empty ones.

        Raises:
            ValueError: the data differ from those of the first pass.
        """
        expected = self._fingerprints or []
        count = 0
        for index, (inputs, targets) in enumerate(self._pairs()):
            if index >= len(expected) or self._fingerprint(inputs, targets) != expected[index]:
                self._refuse_changed(index)
            count += 1
            size = self.size(inputs, targets)
            if size > 0:
                yield index, Batch(inputs, targets, size, index)
        if count != len(expected):
            self._refuse_changed(count)

    def digest(self) -> str:
        """A hash of the content of all batches in order, the same in another process.

        Raises:
            ValueError: the data differ from those of the first pass.
        """
        digest = hashlib.blake2b(digest_size=16)
        for _, batch in self.batches():
            for leaf in leaves((batch.inputs, batch.targets)):
                digest.update(_summary(leaf) + b";")
            digest.update(f"{batch.size!r}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Check that batches in memory were not modified in place since the first pass (cheap; nothing for a loader).

        Raises:
            ValueError: they were.
        """
        if self.fixed:
            for _ in self.batches():
                pass

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        for index, item in enumerate(self._data):
            if not isinstance(item, tuple | list) or len(item) != 2:
                got = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
                raise TypeError(
                    f"{self.caller}: data: batch {index}: expected a pair (inputs, targets), got {got}; "
                    "several inputs go into a tuple or dict in first place"
                )
            yield item[0], item[1]

    def size(self, inputs: Any, targets: Any) -> float:
        """How many examples a batch counts for.

        Raises:
            ValueError: that cannot be told, or `batch_size` gives no number of them.
        """
        if self._batch_size is not None:
            size = float(self._batch_size(inputs, targets))
            if not np.isfinite(size) or size < 0:
                raise ValueError(f"{self.caller}: batch_size: expected a finite number >= 0, got {size}")
            return size
        count = example_count(inputs)
        if count is None:
            raise ValueError(
                f"{self.caller}: data: cannot tell the number of examples of a batch: its inputs hold no tensor with a "
                "leading dimension; pass batch_size=callable(inputs, targets)"
            )
        return float(count)

    def _fingerprint(self, inputs: Any, targets: Any) -> Any:
        if self.fixed:
            # In memory nothing can be reordered behind our back; in-place changes count the version up.
            return tuple(_version(leaf) for leaf in leaves((inputs, targets)))
        digest = hashlib.blake2b(digest_size=16)
        for leaf in leaves((inputs, targets)):
            digest.update(_summary(leaf))
        return digest.digest()

    def _refuse_changed(self, index: int) -> None:
        if self.fixed:
            raise ValueError(
                f"{self.caller}: data: batch {index} was modified since the operator was made; "
                "pass a copy, or make a new operator"
            )
        raise ValueError(
            f"{self.caller}: data: batch {index} differs from the first pass over the data, so that the operator would "
            "change from product to product: the loader shuffles, augments at random or is exhausted. "
            "Use shuffle=False and deterministic transforms, or pass list(loader)"
        )


def example_count(inputs: Any) -> int | None:
    """The leading dimension of the first tensor or array; None where there is none."""
    first = next((leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor | np.ndarray)), None)
    return None if first is None or first.ndim == 0 else int(first.shape[0])


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and mappings, in order."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield str(key)
            yield from leaves(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def to_device(tree: Any, device: torch.device | None, dtype: Callable[[Tensor], torch.dtype] | None = None) -> Any:
    """Move the tensors of nested tuples, lists and mappings; inference tensors become ones that autograd can save.

    Args:
        tree: the tensors.
        device: where to; None leaves them where they are.
        dtype: gives the type to convert a tensor to.
    """
    if isinstance(tree, Tensor):
        moved = tree.to(device=device, dtype=None if dtype is None else dtype(tree))
        return moved.clone() if moved.is_inference() else moved
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(to_device(value, device, dtype) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(to_device(value, device, dtype) for value in tree)
    if isinstance(tree, Mapping):
        moved_items = {key: to_device(value, device, dtype) for key, value in tree.items()}
        try:
            return type(tree)(moved_items)  # type: ignore[call-arg]
        except TypeError:
            return moved_items
    move = getattr(tree, "to", None)  # batches of other libraries: graphs, packed sequences
    return move(device) if device is not None and callable(move) else tree


def _normalise(data: Any, caller: str) -> tuple[Iterable[Any], bool]:
    """Tell a batch from a list of batches from a loader; return an iterable of pairs and whether it is in memory."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(
                f"{caller}: data: a tuple is one batch (inputs, targets), got {len(data)} entries; "
                "pass several batches as a list"
            )
        return [data], True
    if isinstance(data, list):
        # The default collate function of a DataLoader makes lists: [inputs, targets] is one batch if it looks like it.
        if len(data) == 2 and (not isinstance(data[0], tuple | list) or not isinstance(data[1], tuple | list)):
            return [data], True
        return list(data), True
    if isinstance(data, Tensor | Mapping | str):
        raise TypeError(
            f"{caller}: data: expected (inputs, targets), a list of such batches or a DataLoader, "
            f"got {type(data).__name__}"
        )
    if isinstance(data, Dataset):
        raise TypeError(f"{caller}: data: a Dataset yields single examples; use DataLoader(dataset, batch_size=...)")
    if not isinstance(data, Iterable):
        raise TypeError(
            f"{caller}: data: expected (inputs, targets), a list of such batches or a DataLoader, "
            f"got {type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"{caller}: data: an iterator can be read only once, and every product reads the data; pass list(data)"
        )
    return data, False


def _refuse_random_sampler(loader: DataLoader[Any], caller: str) -> None:
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    if any(isinstance(sampler, _RANDOM_SAMPLERS) for sampler in samplers):
        raise ValueError(
            f"{caller}: data: the DataLoader shuffles, so that every product would see other batches; "
            "make one with shuffle=False, or pass list(loader)"
        )


def _refuse_repeating_sampler(loader: DataLoader[Any], caller: str) -> None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler) and sampler.total_size > len(sampler.dataset):  # type: ignore[arg-type]
            raise ValueError(
                f"{caller}: data: the DistributedSampler repeats {sampler.total_size - len(sampler.dataset)} examples "  # type: ignore[arg-type]
                "to give every rank as many, which would count twice; shares may be of any size here: use a Subset per "
                "rank, such as Subset(dataset, range(rank, len(dataset), ranks))"
            )


def _version(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        # An inference tensor has no version counter; it cannot be told whether it was changed.
        return (leaf.data_ptr(), tuple(leaf.shape), 0 if leaf.is_inference() else leaf._version)
    if isinstance(leaf, np.ndarray):
        return _summary(leaf)
    return _plain(leaf)


def _summary(leaf: Any) -> bytes:
    """A few bytes that almost surely differ when the leaf's content or order does."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        leaf = torch.from_numpy(np.ascontiguousarray(leaf))
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype}{tuple(leaf.shape)}{checksum(leaf)}".encode()
    return _plain(leaf).encode()


def _plain(leaf: Any) -> str:
    # The repr of an arbitrary object shows its address, which differs in every pass though the content does not.
    return repr(leaf) if isinstance(leaf, int | float | complex | str | bytes | type(None)) else type(leaf).__qualname__


def checksum(tensor: Tensor) -> int:
    """An order-sensitive 64-bit checksum of a tensor's bits, computed on its device in a few passes over memory."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().reshape(-1)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    words = flat.view(width)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, first in enumerate(range(0, words.numel(), _CHUNK)):
        chunk = words[first : first + _CHUNK].to(torch.int64)
        # Odd multipliers from a linear congruence (Knuth's MMIX constant); products and sums wrap modulo 2**64.
        places = torch.arange(chunk.numel(), device=chunk.device, dtype=torch.int64)
        multipliers = places.add_(index * _CHUNK + 1).mul_(6364136223846793005).bitwise_or_(1)
        total += (chunk * multipliers).sum()
    return int(total)
