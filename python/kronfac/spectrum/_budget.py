"""What a search for eigenpairs may spend: products, and the user's patience."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kronfac.linalg.symmetric import CheckedOperator
from kronfac.linalg.trace import StoppedError
from kronfac.spectrum._interrupt import Interrupt
from kronfac.spectrum.results import Ended


@dataclass
class Budget:
    """Counts products, reports them, and says when to stop.

    Attributes:
        limit: products to spend in all.
        reserved: of these kept for the end: the residuals, or a check of what is known of them.
        stop: a KeyboardInterrupt.
        report: called with the products spent so far, or None.
        spent: products so far.
    """

    limit: int
    reserved: int
    stop: Interrupt
    report: Callable[[int, int | None], None] | None
    spent: int = 0

    def allows(self, products: int) -> bool:
        """Whether so many more may be spent on the search.

        Raises:
            KeyboardInterrupt: the user asked to stop before there was anything to return.
        """
        return not self.stop.stops(self.spent) and self.spent + products <= self.limit - self.reserved

    def affords(self, products: int) -> bool:
        """Whether so many more may be spent, also of those reserved."""
        return not self.stop.requested and self.spent + products <= self.limit

    def broken(self) -> None:
        """Note that a Ctrl-C broke the product under way.

        Raises:
            KeyboardInterrupt: it was the first, so that there is nothing to return.
        """
        self.stop.stops(self.spent)

    def images(self, operator: CheckedOperator, columns: Tensor) -> Tensor | None:
        """Products with the vectors found (n, k), from those that are reserved; None where the user asked to stop."""
        if self.stop.requested:
            return None
        try:
            images = operator.matmat(columns)
        except StoppedError:
            return None
        self.count(columns.shape[1])
        return images

    def count(self, products: int) -> None:
        """Note so many as spent."""
        self.spent += products
        if self.report is not None:
            self.report(self.spent, None)

    def ended(self, *, finished: bool) -> Ended:
        """Why the search is over, which finished or not."""
        if self.stop.requested:
            return "interrupted"
        return "finished" if finished else "limit"
