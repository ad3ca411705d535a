"""Products of a stochastic estimate, counted and reported, and left off where the user asks."""

from __future__ import annotations

from dataclasses import dataclass

from kronfac.linalg.trace import StoppedError
from kronfac.spectrum._interrupt import Interrupt
from kronfac.spectrum._options import Progress


@dataclass
class Tally:
    """Called with the number of products after each call of op @ V.

    Attributes:
        stop: a KeyboardInterrupt.
        report: called with the products spent so far and in all, or None.
        total: products in all, or None where that is not known.
        spent: so far.
    """

    stop: Interrupt
    report: Progress | None
    total: int | None
    spent: int = 0

    def __call__(self, products: int) -> None:
        """Note so many as spent.

        Raises:
            StoppedError: the user asked to stop.
        """
        self.spent += products
        if self.report is not None:
            self.report(self.spent, self.total)
        if self.stop.requested:
            raise StoppedError
