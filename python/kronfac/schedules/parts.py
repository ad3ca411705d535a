"""What a schedule hands out: steps, and the small batches that each is computed in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A small batch: some of the examples of a step, for one forward and backward.

    Attributes:
        indices: positions of the examples (n,), int64, on the CPU.
        weight: their share of the step's examples. The weights of a step sum to one, so that with a loss that is a mean
            over its examples the sum of weight * loss is the mean over the step.
        adversarial: how many leading examples are to be perturbed; 0 for none.
        batch: what the loader gave for these examples; None where the schedule has no loader.
    """

    indices: Tensor
    weight: float
    adversarial: int = 0
    batch: Any = None


@dataclass(frozen=True, eq=False)
class Step:
    """The examples of one update of the parameters.

    Attributes:
        parts: small batches, in order. With a loader they can be read only once: each batch is fetched when its turn
            comes.
        number: of the step in its epoch, 0-based.
        update: of the step in the run, 0-based.
        examples: how many it has.
    """

    parts: Iterable[Part]
    number: int
    update: int
    examples: int


def cut_step(indices: Tensor, small_batch: int, omega: float) -> tuple[Part, ...]:
    """Cut the examples of a step into small batches; the last may be smaller, and weighs less.

    Args:
        indices: of the step (n,).
        small_batch: the most examples of a part.
        omega: share of the examples of each part that are to be perturbed.
    """
    return tuple(
        Part(piece.clone(), len(piece) / len(indices), adversarial_examples(len(piece), omega))
        for piece in pieces(indices, small_batch)
    )


def pieces(indices: Tensor, size: int) -> list[Tensor]:
    """Consecutive pieces of a size; the last may be smaller."""
    return [indices[at : at + size] for at in range(0, len(indices), size)]


def adversarial_examples(examples: int, omega: float) -> int:
    """How many of a small batch are perturbed: floor(ω b) where ω > 1/b, else none (Yao et al., arXiv:1810.01021)."""
    # Round-off: 0.29 * 100 is below 29.
    share = omega * examples * (1 + 1e-12)
    return math.floor(share) if share > 1 + 1e-9 else 0


class Fed:
    """The parts of a step, each with what a loader yields for it; read once.

    Args:
        parts: of the step.
        batches: of the loader, at the step's first part.
        caller: the public function that error messages name.
    """

    def __init__(self, parts: tuple[Part, ...], batches: Iterator[Any], caller: str) -> None:
        self._parts, self._batches, self._caller = parts, batches, caller
        self._next = 0

    @property
    def unread(self) -> int:
        """How many parts were not asked for."""
        return len(self._parts) - self._next

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Part]:
        while self._next < len(self._parts):
            part = self._parts[self._next]
            self._next += 1
            try:
                batch = next(self._batches)
            except StopIteration:
                raise RuntimeError(f"{self._caller}: loader: it ended before the epoch did") from None
            yield Part(part.indices, part.weight, part.adversarial, batch)
