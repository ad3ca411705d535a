"""Calls an emulation in every order of threads, on copies of its tensors, and compares the bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.cuda import emulation

_inside = False


def in_every_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, in all orders; what it returns and changes is that of the last one.

    What it is given, with all of the memory around it, and what it returns must be the same to the last bit.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _inside
        given = (args, kwargs)
        if _inside or not any(map(_lies_here, tree_flatten(given)[0])):
            return function(*args, **kwargs)
        first: list[Any] | None = None
        result, random = None, torch.get_rng_state()
        _inside = True
        try:
            for order in emulation.ORDERS:
                torch.set_rng_state(random)
                own = given if order == emulation.ORDERS[-1] else _copied(given)
                with emulation.threads_in(order):
                    result = function(*own[0], **own[1])
                found = _bits((result, own))
                if first is None:
                    first = found
                assert _equal(first, found), f"{function.__name__}: the result depends on the order of threads"
        finally:
            _inside = False
        return result

    return call


def _lies_here(leaf: Any) -> bool:
    """Whether it is a tensor with entries: those on the device meta have none."""
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu"


def _copied(given: Any) -> Any:
    """Tensors that share memory go on doing so."""
    memory: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        if not _lies_here(tensor):
            return tensor
        storage = tensor.untyped_storage()
        own = memory.setdefault(storage.data_ptr(), storage.clone())
        return torch.empty(0, dtype=tensor.dtype).set_(own, tensor.storage_offset(), tensor.shape, tensor.stride())

    return tree_map_only(Tensor, copied, given)


def _bits(value: Any) -> list[Any]:
    """Plain numbers as they are, of tensors all memory that they lie in."""
    found: list[Any] = []
    for leaf in tree_flatten(value)[0]:
        if _lies_here(leaf):
            storage = leaf.untyped_storage()
            found.append(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).clone())
        elif isinstance(leaf, int | float | str):
            found.append(leaf)
    return found


def _equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )
