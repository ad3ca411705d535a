"""What a computation holds in memory, measured by watching the tensors it makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Usage:
    """Bytes of tensors that a computation made.

    Attributes:
        peak: the most that were alive at once.
        kept: alive at its end, as long as its result is.
    """

    peak: int
    kept: int


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators return, from birth to death, on all devices together.

    What a kernel allocates for itself while it runs (workspaces) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Arguments first: views and in-place operators return storages that were there before.
        given = {address for address, _ in _storages((args, kwargs))}
        for address, storage in _storages(result):
            if address not in given and address not in self._known:
                size = storage.nbytes()
                self._known[address] = weakref.finalize(storage, self._died, address, size)
                self.alive += size
        self.peak = max(self.peak, self.alive)
        return result

    def _died(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.alive -= size

    def forget(self) -> None:
        """Watch no longer."""
        for finalizer in self._known.values():
            finalizer.detach()
        self._known.clear()


def _storages(tree: Any) -> list[tuple[int, Any]]:
    found = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            try:
                storage = leaf.untyped_storage()
            except (NotImplementedError, RuntimeError):  # sparse tensors have none of their own
                continue
            if storage.nbytes() > 0:
                found.append((storage._cdata, storage))
    return found


def measure(run: Callable[[], object]) -> Usage:
    """Run a computation and measure the tensors that it makes.

    Args:
        run: its result is held until the measurement ends.
    """
    watch = _Watch()
    try:
        with watch:
            result = run()
            kept = watch.alive
            del result
    finally:
        watch.forget()
    return Usage(watch.peak, kept)
