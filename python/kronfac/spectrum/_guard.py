"""Products that a Ctrl-C breaks count as interrupted, not as failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kronfac.linalg.symmetric import CheckedOperator
from kronfac.linalg.trace import StoppedError
from kronfac.spectrum._interrupt import Interrupt


class Guarded:
    """An operator whose product raises `StoppedError` where it fails after the user asked to stop.

    A terminal sends Ctrl-C to all processes: persistent workers of a DataLoader, which were there before, end by it,
    and the pass over the data that is under way raises RuntimeError.
    """

    def __init__(self, operator: Any, stop: Interrupt) -> None:
        self.operator = operator
        self.stop = stop

    def __matmul__(self, vectors: Any) -> Any:
        """The product.

        Raises:
            StoppedError: it failed after the user asked to stop.
        """
        with breakable(self.stop):
            return self.operator @ vectors


@contextmanager
def breakable(stop: Interrupt) -> Iterator[None]:
    """A pass over the data that counts as interrupted where it fails after the user asked to stop.

    Raises:
        StoppedError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if stop.requested:
            raise StoppedError from error
        raise


def guarded(operator: CheckedOperator, stop: Interrupt) -> CheckedOperator:
    """The same operator with `Guarded` products."""
    return dataclasses.replace(operator, operator=Guarded(operator.operator, stop))
