"""Steps of which only the device knows whether they were taken.

A step between factorisations does not wait to learn whether everything was finite. The device skips it where something
was not, and counts that here. The count is settled at steps that wait anyway; until then the optimizer's own step
number is ahead by it. Looking at the count, for a property or a checkpoint, settles nothing, so that the ranks of a
process group keep the same step number although only one of them writes checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

CAUSE = "the gradients, curvature statistics or preconditioned gradients of an earlier step were"
"""What a warning can say of a skipped step that nobody has looked at in time."""


class Ledger:
    """Counts skipped steps on the device."""

    def __init__(self) -> None:
        self._skipped: Tensor | None = None
        self._surprising = False

    @property
    def is_open(self) -> bool:
        """Whether there is a count on a device, into which a captured step can write."""
        return self._skipped is not None

    def note(self, good: Tensor, *, probing: bool) -> None:
        """Count a step as skipped where `good` is False. No host synchronisation.

        Args:
            good: bool ().
            probing: whether somebody provokes skipped steps on purpose, as a GradScaler does.
        """
        bad = good.logical_not().to(torch.int64)
        if self._skipped is None or self._skipped.device != good.device:
            self.start(self.look(), good.device)
        assert self._skipped is not None
        self._skipped.add_(bad)
        self._surprising = self._surprising or not probing

    def look(self) -> int:
        """How many steps were skipped since the last settlement. Waits for the device; nothing changes."""
        return 0 if self._skipped is None else int(self._skipped)

    def settle(self) -> tuple[int, bool]:
        """The same, with whether that is worth a warning; the count begins anew."""
        skipped, surprising = self.look(), self._surprising
        if self._skipped is not None and skipped:
            self._skipped.zero_()  # in place: a captured step goes on writing there
        self._surprising = False
        return skipped, skipped > 0 and surprising

    def start(self, skipped: int, device: torch.device) -> None:
        """Begin with a count, as a checkpoint has it."""
        self._skipped = torch.full((), skipped, dtype=torch.int64, device=device)
