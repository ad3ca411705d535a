"""Which eigenvalues are asked for, and which of the approximate ones are taken for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kronfac.linalg.subspace import Float64Array

ORDERS = ("magnitude", "largest", "smallest", "both")

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Wanted:
    """k eigenvalues of largest magnitude, of an algebraic end, or of both ends.

    Attributes:
        k: how many.
        which: one of `ORDERS`; of "both" the odd one is of the upper end.
    """

    k: int
    which: str

    def order(self, values: Float64Array) -> Indices:
        """Indices of ascending values by how much they are wanted."""
        if self.which != "both":
            return np.argsort(-self.scores(values), kind="stable")
        count = len(values)
        order = np.empty(count, dtype=np.intp)
        order[0::2] = np.arange(count)[::-1][: (count + 1) // 2]
        order[1::2] = np.arange(count // 2)
        return order

    def scores(self, values: Float64Array) -> Float64Array:
        """How much each is wanted; values in the order of `order` where both ends are."""
        if self.which == "magnitude":
            return np.abs(values)
        if self.which == "both":
            return np.where(np.arange(len(values)) % 2 == 0, values, -values)
        return values if self.which == "largest" else -values

    def arranged(self, values: Float64Array) -> Indices:
        """Indices of values in the order in which they are returned."""
        if self.which == "both":
            return np.argsort(-values, kind="stable")
        return np.argsort(-self.scores(values), kind="stable")

    def rivals(self, values: Float64Array, order: Indices) -> list[tuple[int, float]]:
        """Those next in line, where there are any.

        Args:
            values: ascending.
            order: of `order`.

        Returns:
            The index of the outermost value at each end of those not wanted, and how far it is from being wanted.
        """
        rest = np.sort(order[self.k :])
        if len(rest) == 0:
            return []
        lowest, highest = int(rest[0]), int(rest[-1])
        last = order[self.k - 1]
        if self.which == "largest":
            return [(highest, float(values[last] - values[highest]))]
        if self.which == "smallest":
            return [(lowest, float(values[lowest] - values[last]))]
        if self.which == "magnitude":
            return [(index, float(abs(values[last]) - abs(values[index]))) for index in (lowest, highest)]
        upper = order[(self.k - 1) // 2 * 2]
        found = [(highest, float(values[upper] - values[highest]))]
        if self.k >= 2:
            lower = order[self.k // 2 * 2 - 1]
            found.append((lowest, float(values[lowest] - values[lower])))
        return found

    def kept(self, order: Indices, room: int) -> Indices:
        """What a restart keeps: the wanted and about `room` neighbours, which speed up the next round."""
        rest = order[self.k :]
        if self.which in ("largest", "smallest"):
            rest = rest[: max(1, room)]
        else:
            # From both ends: were only the larger side kept, what approaches at the other would be lost every time.
            low, rest = max(1, room // 2), np.sort(rest)
            rest = np.concatenate([rest[:low], rest[max(low, len(rest) - max(1, room - room // 2)) :]])
        return np.concatenate([order[: self.k], rest])
