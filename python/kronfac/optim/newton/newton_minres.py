"""Newton's method with MINRES as its inner solver, which tells Newton steps from directions of non-positive curvature.

Sources: Liu & Roosta, "MINRES: From negative curvature detection to monotonicity properties" (SIAM J. Optim. 32, 2022)
and "A Newton-MR algorithm with complexity guarantees for nonconvex smooth unconstrained optimization"
(arXiv:2208.07095).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kronfac.curvature import Likelihood
from kronfac.linalg.lanczos import norm
from kronfac.linalg.newton_minres import DirectionKind, newton_minres
from kronfac.linalg.solve import dot
from kronfac.optim.newton.base import COMMON_OPTIONS, Check, NewtonOptimizer, NewtonStep, positive
from kronfac.optim.newton.evaluation import Evaluation, SampleSize, check_ratio_sample
from kronfac.optim.newton.line_search import armijo
from kronfac.optim.options import integer, number


def _fraction(where: str, value: object) -> float:
    """A number inside (0, 1)."""
    return number(where, value, high=1.0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class NewtonMINRESStep(NewtonStep):
    """What one step of `NewtonMINRES` did.

    Attributes:
        kind: of the direction d: "solution", about -H⁻¹g, or "nonpositive", a residual r with rᵀHr <= 0.
        step_size: α of the step α·d; 0 where nothing moved.
        slope: gᵀd.
        curvature: rᵀHr / rᵀr of the last residual r that MINRES tested.
        line_search_evaluations: of the loss, along d.
    """

    kind: DirectionKind
    step_size: float
    slope: float
    curvature: float
    line_search_evaluations: int


class NewtonMINRES(NewtonOptimizer):
    """Newton-MINRES: Newton steps where the curvature is positive, residuals of MINRES where it is not.

    Every step solves H s = -g by MINRES, which tests each residual r for rᵀHr <= 0 at no cost. While none passes, s is
    a direction of descent, taken with backtracking from step 1. The first that passes is followed instead, forward as
    long as the loss decreases enough. Decrease is measured by the first-order condition
    F(w + α d) <= F(w) + `decrease`·α·gᵀd for both kinds.

        optimizer = kronfac.optim.NewtonMINRES(model.parameters(), examples=len(x))
        for _ in range(100):
            optimizer.step(lambda i: F.cross_entropy(model(x if i is None else x[i]), y if i is None else y[i]))
            print(optimizer.last_step.kind, optimizer.last_step.step_size)

    From step to step only the counters and the state of the samples' generator are carried, so that a run resumes bit
    for bit from `state_dict`.

    Args:
        params: parameters or param groups; all groups share their options.
        examples: how many examples the closure knows; None where it is only asked for all of them.
        curvature: H: "hessian", "ggn" or "fisher", as in `kronfac.operators.ClosureOperator`. The last two are positive
            semi-definite (for convex losses) and need a closure that returns (loss, outputs); of non-positive curvature
            they show 0 alone.
        likelihood: of the outputs, for curvature="fisher".
        gradient_sample: examples that g is taken on: None for all, a float in (0, 1] for a share, an int for a number;
            drawn anew in every step, without replacement.
        hessian_sample: likewise for H.
        line_search_sample: likewise for the losses of the line search; "gradient" for the gradient's own sample, whose
            loss at the start is known and whose slope g is.
        chunk_size: the most examples handed to the closure at once.
        tolerance: η > 0: MINRES stops at ‖Hr‖ <= η‖Hs‖.
        max_iterations: of MINRES; the s reached is then used.
        decrease: in (0, 1), the share of the decrease promised by the slope that is asked for.
        shrink: in (0, 1), by which lengths are multiplied when going back, and divided when going forward.
        max_evaluations: of the loss in one line search. Where none decreases it enough nothing moves.
        seed: of the samples.
        history: how many records `history` holds.

    Attributes:
        last_step: `NewtonMINRESStep` of the last step, None before the first.
        history: those of the last steps, oldest first; not part of checkpoints.
        steps: how many steps were made.
        propagations: example-propagations spent: n for a gradient or a loss over n examples, 2n for a product with the
            curvature over n examples; where `examples` is None, in passes over all of them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an option out of range or unknown, groups that differ, samples without `examples`.
    """

    last_step: NewtonMINRESStep | None
    history: deque[NewtonMINRESStep]  # type: ignore[assignment]  # narrower: only this class writes to it

    OPTIONS: ClassVar[Mapping[str, Check]] = {
        **{name: check for name, check in COMMON_OPTIONS.items() if name != "ratio_sample"},
        "line_search_sample": check_ratio_sample,
        "tolerance": positive,
        "max_iterations": integer,
        "decrease": _fraction,
        "shrink": _fraction,
        "max_evaluations": integer,
    }

    def __init__(
        self,
        params: Iterable[Any],
        *,
        examples: int | None = None,
        curvature: str = "hessian",
        likelihood: str | Likelihood | None = None,
        gradient_sample: SampleSize = None,
        hessian_sample: SampleSize = None,
        line_search_sample: SampleSize | str = "gradient",
        chunk_size: int | None = None,
        tolerance: float = 0.01,
        max_iterations: int = 250,
        decrease: float = 1e-4,
        shrink: float = 0.5,
        max_evaluations: int = 50,
        seed: int = 0,
        history: int = 1000,
    ) -> None:
        options = {
            "curvature": curvature,
            "gradient_sample": gradient_sample,
            "hessian_sample": hessian_sample,
            "line_search_sample": line_search_sample,
            "chunk_size": chunk_size,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "decrease": decrease,
            "shrink": shrink,
            "max_evaluations": max_evaluations,
        }
        super().__init__(params, options, {}, examples=examples, likelihood=likelihood, seed=seed, history=history)

    def _iterate(
        self, run: Evaluation, options: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[NewtonMINRESStep, Mapping[str, Any]]:
        gradient_sample = run.sample(options["gradient_sample"])
        hessian_sample = run.sample(options["hessian_sample"])
        sample = self._ratio_sample(run, {"ratio_sample": options["line_search_sample"]}, gradient_sample)
        loss, gradient = run.gradient(gradient_sample)
        operator = run.operator(hessian_sample, options["curvature"], self.likelihood)
        result = newton_minres(
            operator, gradient, tolerance=options["tolerance"], max_iterations=options["max_iterations"]
        )
        operator.release()  # the graph is not needed any more, and the line search needs memory of its own
        direction, slope = result.direction, dot(gradient, result.direction)
        start = loss if sample is gradient_sample else run.starting_loss(sample, "the line search")
        search = armijo(
            lambda length: run.loss(sample, length * direction),
            start,
            slope,
            forward=result.kind == "nonpositive",
            decrease=options["decrease"],
            shrink=options["shrink"],
            max_evaluations=options["max_evaluations"],
            noise=run.round_off(start),
        )
        moved = search.length > 0
        if moved:
            run.move(search.length * direction)
        record = NewtonMINRESStep(
            step=self.steps,
            loss=loss,
            loss_after=search.loss if moved else loss,
            ratio=None,
            accepted=moved,
            status=result.status,
            iterations=result.iterations,
            step_norm=search.length * norm(direction),
            gradient_norm=norm(gradient),
            gradient_examples=gradient_sample.size,
            hessian_examples=hessian_sample.size,
            ratio_examples=sample.size,
            propagations=run.propagations,
            kind=result.kind,
            step_size=search.length,
            slope=slope,
            curvature=result.curvature,
            line_search_evaluations=search.evaluations,
        )
        return record, values
