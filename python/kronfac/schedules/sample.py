"""A fixed number of examples out of data in one of several forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from kronfac.operators.data import example_count, leaves

Sample: TypeAlias = "tuple[Any, Any]"
"""(inputs, targets) of all the examples."""


def take(data: Any, examples: int, seed: int, caller: str) -> Sample:
    """Take examples out of data: a random subset of (inputs, targets) or a Dataset, the first ones of a list or loader.

    Returns:
        (inputs, targets), detached copies.

    Raises:
        TypeError: data of another form.
        ValueError: fewer examples than asked for, tensors that differ in their leading dimension or are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, tuple) and len(data) == 2:
        count = _count(data, caller)
        _check_enough(count, examples, caller)
        sample = _pair(_rows(data, torch.randperm(count, generator=generator)[:examples]), caller)
    elif isinstance(data, Dataset):
        count = len(data)  # type: ignore[arg-type]  # TypeError where there is none
        _check_enough(count, examples, caller)
        chosen = torch.randperm(count, generator=generator)[:examples].tolist()
        sample = _pair(default_collate([data[index] for index in chosen]), caller)
        _count(sample, caller)
    elif isinstance(data, (list, DataLoader)):
        sample = _first(data, examples, caller)
    else:
        raise TypeError(
            f"{caller}: data: expected (inputs, targets), a Dataset, a list of batches or a DataLoader, "
            f"got {type(data).__name__}"
        )
    for leaf in leaves(sample):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            raise ValueError(f"{caller}: data: expected finite examples, got NaN or infinity")
    return sample


def _first(batches: Any, examples: int, caller: str) -> Sample:
    found: list[Sample] = []
    total = 0
    for item in batches:
        pair = _pair(item, caller)
        count = _count(pair, caller)
        found.append(_rows(pair, torch.arange(min(count, examples - total))))
        total += min(count, examples - total)
        if total == examples:
            break
    _check_enough(total, examples, caller)
    return _pair(_joined(found, caller), caller)


def _pair(item: Any, caller: str) -> Sample:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(f"{caller}: data: expected pairs (inputs, targets), got {type(item).__name__}")
    return item[0], item[1]


def _count(pair: Sample, caller: str) -> int:
    """The leading dimension that all tensors share."""
    count = example_count(pair[0])
    tensors = _tensors(pair)
    if count is None or not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count for leaf in tensors):
        raise ValueError(
            f"{caller}: data: expected inputs and targets to be tensors with the examples in their leading dimension, "
            f"got {[tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tensors]}"
        )
    return count


def _tensors(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in _tensors(value)]
    if isinstance(tree, (tuple, list)):
        return [leaf for value in tree for leaf in _tensors(value)]
    return [tree]


def _rows(tree: Any, indices: Tensor) -> Any:
    if isinstance(tree, Mapping):
        return {key: _rows(value, indices) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_rows(value, indices) for value in tree)
    return tree.detach()[indices.to(tree.device)]


def _joined(trees: list[Any], caller: str) -> Any:
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: _joined([tree[key] for tree in trees], caller) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([tree[index] for tree in trees], caller) for index in range(len(first)))
    if len({leaf.shape[1:] for leaf in trees}) > 1:
        raise ValueError(f"{caller}: data: expected examples of one shape, got batches of several")
    return torch.cat(trees)


def _check_enough(count: int, examples: int, caller: str) -> None:
    if count < examples:
        raise ValueError(
            f"{caller}: examples: expected at most the {count} examples that the data have, got {examples}"
        )
