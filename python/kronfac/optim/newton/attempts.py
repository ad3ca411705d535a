"""Steps that try one solution of their model after the other until the loss has decreased as promised."""

from __future__ import annotations

from dataclasses import dataclass

from kronfac.optim.newton.base import NewtonStep


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One solution of a step's model, and what came of it.

    Attributes:
        status: of the solver.
        iterations: of the solver on the way to the step.
        products: with the curvature that were spent: mostly 0 after the first attempt, whose products are used again.
        norm: ‖s‖, in the norm of the solver.
        model_decrease: what the model promises.
        loss_after: on the sample of the ratio, NaN where it was not evaluated.
        ratio: ρ, None where it was not taken.
        outcome: "accepted", "rejected", "no_decrease" (the model promises none: at a stationary point) or "unresolved"
            (it promises less than the round-off of the loss; such a step is taken if the loss does not rise, and says
            nothing about the next model).
    """

    status: str
    iterations: int
    products: int
    norm: float
    model_decrease: float
    loss_after: float
    ratio: float | None
    outcome: str


@dataclass(frozen=True, kw_only=True)
class AttemptedStep(NewtonStep):
    """A step made of attempts; `status` is that of the last one.

    Attributes:
        attempts: in their order, the last one accepted or none.
    """

    attempts: tuple[Attempt, ...]

    @property
    def rejections(self) -> int:
        """How many attempts were rejected."""
        return sum(attempt.outcome == "rejected" for attempt in self.attempts)
