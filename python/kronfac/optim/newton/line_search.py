"""Line searches that ask for sufficient decrease, from step 1: backward for Newton steps, also forward for others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LineSearchResult:
    """How far to go.

    Attributes:
        length: α, 0 where no length tried decreases the loss enough.
        loss: there; where α = 0 that of the start.
        evaluations: of the loss.
    """

    length: float
    loss: float
    evaluations: int


def armijo(
    evaluate: Callable[[float], float],
    loss: float,
    slope: float,
    *,
    forward: bool,
    decrease: float,
    shrink: float,
    max_evaluations: int,
    noise: float = 0.0,
) -> LineSearchResult:
    """Find a length α with F(α) <= F(0) + decrease·α·F'(0), the first-order condition of Armijo (1966).

    Begins at α = 1 and multiplies by `shrink` until the condition holds. With `forward`, where it holds at 1, α is
    divided by `shrink` instead as long as it holds (Liu & Roosta, "A Newton-MR algorithm with complexity guarantees for
    nonconvex smooth unconstrained optimization", arXiv:2208.07095, algorithm 3): along a direction of non-positive
    curvature nothing says that 1 is about right. Of the lengths that met the condition that of least loss is taken,
    which decreases the loss at least as far as the longest.

    Where the slope promises less than the round-off of F the condition compares rounding errors: such a length is taken
    if the loss does not rise, shorter ones are not tried, and forward it goes on unless the loss rises by more.

    Args:
        evaluate: F, which may be infinite or NaN: the condition then does not hold.
        loss: F(0).
        slope: F'(0) < 0; else no length is tried.
        forward: whether longer steps than 1 are tried.
        decrease: share of the decrease that the slope promises, in (0, 1).
        shrink: in (0, 1).
        max_evaluations: >= 1.
        noise: round-off of F.

    Returns:
        The length with its loss.
    """
    best, best_loss = 0.0, loss
    evaluations = 0
    length = 1.0
    while slope < 0 and evaluations < max_evaluations:
        found = evaluate(length)
        evaluations += 1
        promised = -length * slope
        unresolved = promised <= noise
        if not math.isfinite(found):
            enough = going = False
        elif unresolved:
            enough, going = found <= loss, found <= loss + noise
        else:
            enough = going = found <= loss - decrease * promised
        if enough and found <= best_loss:
            best, best_loss = length, found
        if evaluations == 1:
            forward = forward and going
        if forward and not going:
            break
        if not forward and (enough or unresolved):
            break
        length = length / shrink if forward else length * shrink
    return LineSearchResult(best, best_loss, evaluations)
