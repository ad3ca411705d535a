"""What Hessian-free optimization does within a step: solve, choose an iterate and its length, move the damping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kronfac.linalg.truncated_cg import Iterate, TruncatedResult, truncated_cg
from kronfac.operators.closure import ClosureOperator
from kronfac.optim.newton.evaluation import Evaluation, Sample

_DAMPING_FACTOR = 1.5  # Martens (2010), section 4.1, as the thresholds
_LOW_RATIO, _HIGH_RATIO = 0.25, 0.75
_ARMIJO = 1e-2
_SHRINK = 0.8
_RESCUE = 10.0


@dataclass(frozen=True, eq=False)
class Solved:
    """The inner solution.

    Attributes:
        result: of the last attempt.
        damping: that it was found with.
        iterations: of all attempts.
    """

    result: TruncatedResult
    damping: float
    iterations: int


@dataclass(frozen=True, eq=False)
class Trial:
    """An iterate of conjugate gradients as a step.

    Attributes:
        iterate: None where there is none.
        length: the step is that multiple of it; 0 for none.
        loss: after the step.
        losses: how many were evaluated to choose it.
    """

    iterate: Iterate | None
    length: float
    loss: float
    losses: int


def solve(
    operator: ClosureOperator,
    gradient: Tensor,
    damping: float,
    previous: Tensor | None,
    options: Mapping[str, Any],
    preconditioner: Any,
) -> Solved:
    """Conjugate gradients, again from zero or with more damping where they end without a direction of descent."""
    start = None if previous is None or not options["decay"] else previous * options["decay"]
    iterations = 0
    while True:
        result = truncated_cg(
            operator,
            gradient,
            shift=damping,
            start=start,
            tolerance=options["tolerance"],
            max_iterations=options["max_iterations"],
            preconditioner=preconditioner,
            keep=options["backtrack"],
        )
        iterations += result.iterations
        stuck = result.status == "nonpositive_curvature" and result.iterations == 0
        if result.warm and (stuck or result.iterates[-1].slope >= 0):
            start = None
        elif stuck and damping < options["max_damping"]:
            damping = min(max(_RESCUE * damping, -2.0 * result.rayleigh), options["max_damping"])
        else:
            return Solved(result, damping, iterations)


def best_iterate(run: Evaluation, sample: Sample, iterates: Sequence[Iterate]) -> Trial:
    """From the last iterate backwards as long as the loss falls (Martens 2010, section 4.7)."""
    best = Trial(iterates[-1], 1.0, run.loss(sample, iterates[-1].step), 1)
    for earlier in reversed(iterates[:-1]):
        if earlier.slope >= 0:
            break
        value = run.loss(sample, earlier.step)
        best = replace(best, losses=best.losses + 1)
        if math.isfinite(best.loss) and not value < best.loss:
            break
        best = replace(best, iterate=earlier, loss=value)
    return best


def shortened(run: Evaluation, sample: Sample, trial: Trial, before: float, limit: int) -> Trial:
    """The trial, shortened until it passes Armijo's test; of length 0 where that never happens."""
    iterate = trial.iterate
    assert iterate is not None
    for shortenings in range(limit + 1):
        if shortenings:
            length = trial.length * _SHRINK
            loss = run.loss(sample, iterate.step * length)
            trial = replace(trial, length=length, loss=loss, losses=trial.losses + 1)
        if math.isfinite(trial.loss) and trial.loss <= before + _ARMIJO * trial.length * iterate.slope:
            return trial
    return replace(trial, length=0.0, loss=before)


def next_damping(damping: float, ratio: float, options: Mapping[str, Any]) -> float:
    """The rule of Levenberg and Marquardt with Martens' constants."""
    if ratio < _LOW_RATIO:
        return min(damping * _DAMPING_FACTOR, float(options["max_damping"]))
    if ratio > _HIGH_RATIO:
        return max(damping / _DAMPING_FACTOR, float(options["min_damping"]))
    return damping
