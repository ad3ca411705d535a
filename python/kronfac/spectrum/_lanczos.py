"""The search of a Lanczos subspace, of single vectors or of blocks, for wanted eigenpairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.subspace import Float64Array, Subspace, norm
from kronfac.linalg.trace import StoppedError
from kronfac.spectrum._budget import Budget
from kronfac.spectrum._certificate import CHECKS, bounded, certified, error_bound, random_frame
from kronfac.spectrum._wanted import Indices, Wanted
from kronfac.spectrum.results import EigenResult

# A search for missed copies ends when an eigenvalue further out than the k-th by this share of the spectrum's width
# would have been seen with this probability of failure.
_MISSED_SHARE = 0.01
_MISSED_PROBABILITY = 1e-3
# What the recurrence's residuals leave out, in round-offs of the operator's norm.
_ROUND_OFF = 4.0


@dataclass(frozen=True)
class _Ritz:
    """Ritz pairs with their residuals and the order in which they are wanted; values ascending."""

    values: Float64Array
    coordinates: Float64Array
    residuals: Float64Array
    order: Indices


def checks_of(count: int) -> int:
    """Products that certify so many pairs where the recurrence is exact enough."""
    return CHECKS if count >= CHECKS + 2 else count


class LanczosSearch:
    """The state of one call: a Krylov subspace, what is wanted of it, and what may be spent."""

    def __init__(
        self, subspace: Subspace, wanted: Wanted, tol: float, budget: Budget, *, starts: int, explicit: bool
    ) -> None:
        self.subspace = subspace
        self.wanted = wanted
        # Tighter than the unit round-off cannot be met by any product.
        self.tol = max(tol, subspace.operator.epsilon)
        self.budget = budget
        self.starts = starts
        self.explicit = explicit
        self._finished = False
        self._checked = 0  # size of the subspace when its Ritz pairs were last computed

    def run(self, *, multiplicity: bool) -> EigenResult:
        """Find the pairs, search for further copies, and certify the residuals."""
        self._find(multiplicity=multiplicity)
        while multiplicity and self._finished and not self._starts_suffice(self._ritz()) and self._look_for_copies():
            pass
        return self._result()

    @property
    def _threshold(self) -> float:
        return self.tol * self.subspace.norm

    def _find(self, *, multiplicity: bool) -> None:
        """Grow and restart until the k wanted pairs have converged or the budget is spent."""
        steps, restarted = 0, False
        while self._expand():
            steps += 1
            ritz = self._ritz_if_due()
            if ritz is None:
                continue
            # Where the starts can show all copies, going on from them is cheaper than to start afresh.
            if self._wanted_converged(ritz) and not (
                multiplicity
                and self._starts_suffice(ritz)
                and not self.subspace.complete
                and not self._nothing_missed(ritz, steps, restarted=restarted)
            ):
                self._finished = True
                return
            restarted |= self._restart_if_full(ritz)

    def _starts_suffice(self, ritz: _Ritz) -> bool:
        """Whether every copy of the wanted eigenvalues had a start vector of its own, and one was left over."""
        if self.subspace.complete:
            return True
        near = np.abs(ritz.values[ritz.order[: self.wanted.k], None] - ritz.values[None]) <= self._threshold
        return bool(near.sum(axis=1).max() < self.starts)

    def _look_for_copies(self) -> bool:
        """Search orthogonally to the converged pairs; return whether others took their place and converged too."""
        ritz, k = self._ritz(), self.wanted.k
        chosen = ritz.order[:k]
        before = self.wanted.scores(ritz.values[chosen])
        self.subspace.start_afresh(ritz.values[chosen], ritz.coordinates[:, chosen])
        self._checked = self.subspace.size
        steps, restarted = 0, False
        while self._expand():
            steps += 1
            found = self._ritz_if_due()
            if found is None:
                continue
            gain = float((self.wanted.scores(found.values[found.order[:k]]) - before).sum())
            settled = self._wanted_converged(found)
            if gain > k * self._threshold:
                if settled:
                    return True
            elif settled and (self.subspace.complete or self._nothing_missed(found, steps, restarted=restarted)):
                return False
            restarted |= self._restart_if_full(found)
        self._finished = False
        return False

    def _result(self) -> EigenResult:
        ritz = self._ritz()
        chosen = ritz.order[: self.wanted.k]
        pairs = _Ritz(ritz.values[chosen], ritz.coordinates[:, chosen], ritz.residuals[chosen], np.arange(len(chosen)))
        columns = self.subspace.vectors(pairs.coordinates).mT
        if not (self.explicit or checks_of(len(chosen)) == len(chosen) or self.subspace.forgetful):
            return self._checked_result(pairs, columns)
        images = self.budget.images(self.subspace.operator, columns)
        return self._broken_result(pairs, columns) if images is None else self._measured_result(columns, images)

    def _checked_result(self, pairs: _Ritz, columns: Tensor) -> EigenResult:
        """With bounds on the residuals, unless these are too large although the recurrence says converged."""
        operator, count = self.subspace.operator, len(pairs.values)
        frame = torch.from_numpy(random_frame(count, self.subspace.generator)).to(columns)
        images = self.budget.images(operator, columns @ frame[:, :CHECKS])
        if images is None:
            return self._broken_result(pairs, columns)
        bounds = pairs.residuals + error_bound(self._unexplained(images, columns, pairs, frame[:, :CHECKS]), count)
        met = bool((bounds <= self._threshold).all())
        if self._finished and not met and self.budget.affords(count - CHECKS):
            # The frame is orthogonal: its other columns complete the images.
            rest = self.budget.images(operator, columns @ frame[:, CHECKS:])
            if rest is not None:
                return self._measured_result(columns, torch.cat([images, rest], dim=1) @ frame.mT)
        ended = self.budget.ended(finished=self._finished and met)
        return bounded(columns, pairs.values, bounds, self.wanted, self._threshold, self.budget.spent, ended)

    def _measured_result(self, columns: Tensor, images: Tensor) -> EigenResult:
        ended = self.budget.ended(finished=self._finished)
        return certified(columns, images, self.wanted, self._threshold, self.budget.spent, ended)

    def _broken_result(self, pairs: _Ritz, columns: Tensor) -> EigenResult:
        """Of an interrupted search, which spends no more products."""
        floor = _ROUND_OFF * self.subspace.operator.epsilon * self.subspace.norm
        bounds = pairs.residuals + self.subspace.forgotten(pairs.coordinates) + floor
        return bounded(columns, pairs.values, bounds, self.wanted, self._threshold, self.budget.spent, "interrupted")

    def _unexplained(self, images: Tensor, columns: Tensor, pairs: _Ritz, frame: Tensor) -> float:
        """‖EQ‖ of E = A X - X Θ - Wᵀ C S: what the recurrence does not know of the residuals of the pairs (Θ, X).

        Args:
            images: A X Q.
            columns: X.
            pairs: Θ, and S, the coordinates of X in the basis.
            frame: Q.
        """
        left = images - columns @ (torch.from_numpy(pairs.values).to(columns)[:, None] * frame)
        directions = self.subspace.directions()
        if directions is not None:
            left -= directions.mT @ (torch.from_numpy(self.subspace.coupling(pairs.coordinates)).to(columns) @ frame)
        return norm(left)

    def _ritz(self) -> _Ritz:
        self._checked = self.subspace.size
        values, coordinates, residuals = self.subspace.ritz()
        return _Ritz(values, coordinates, residuals, self.wanted.order(values))

    def _ritz_if_due(self) -> _Ritz | None:
        """Small projections are solved at every step, larger ones now and then: the cost is cubic in their size."""
        size = self.subspace.size
        due = size >= self.wanted.k and size >= self._checked + 1 + size // 80
        return self._ritz() if self.subspace.full or due else None

    def _wanted_converged(self, ritz: _Ritz) -> bool:
        # Half the tolerance, since round-off adds to the residual that the recurrence predicts.
        chosen = ritz.order[: self.wanted.k]
        return len(chosen) == self.wanted.k and bool((ritz.residuals[chosen] <= 0.5 * self._threshold).all())

    def _nothing_missed(self, ritz: _Ritz, steps: int, *, restarted: bool) -> bool:
        """Whether a further eigenvalue beyond the k-th would have shown by now.

        Args:
            ritz: of now.
            steps: taken from a random start.
            restarted: whether storage was full since: the bound is then necessary but not enough.
        """
        rivals = self.wanted.rivals(ritz.values, ritz.order)
        if not rivals:
            return False
        width = float(ritz.values[-1] - ritz.values[0])
        residuals = np.array([ritz.residuals[index] for index, _ in rivals])
        gaps = np.array([distance for _, distance in rivals]) + _MISSED_SHARE * width
        if (residuals <= self._threshold).all():
            return True
        if restarted and (residuals > 0.1 * gaps).any():
            return False  # not settled yet: the outermost values may still move in among the wanted
        # P[λ - θ > share · width] <= 1.648 √n exp(-(2 steps - 1) √share) for the top Ritz value θ of a random start.
        share = min(1.0, float(gaps.min()) / width)
        needed = math.log(1.648 * math.sqrt(self.subspace.operator.size) / _MISSED_PROBABILITY)
        return (2 * steps - 1) * math.sqrt(share) >= needed

    def _restart_if_full(self, ritz: _Ritz) -> bool:
        """Restart where storage is full; return whether it was."""
        if not self.subspace.full or self.subspace.complete:
            return False
        # Half of the room beyond k: so the next round has some to grow.
        keep = self.wanted.kept(ritz.order, (self.subspace.capacity - self.wanted.k) // 2)
        self.subspace.restart(ritz.values[keep], ritz.coordinates[:, keep])
        self._checked = self.subspace.size
        return True

    def _expand(self) -> bool:
        """Grow by one step, if that may be spent."""
        width = self.subspace.width
        if not self.budget.allows(width):
            return False
        try:
            self.subspace.expand()
        except StoppedError:
            self.budget.broken()
            return False
        self.budget.count(width)
        return True
