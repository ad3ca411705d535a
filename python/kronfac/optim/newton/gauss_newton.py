"""Hessian-free optimization: damped Gauss-Newton, natural gradient or Newton steps by conjugate gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kronfac.curvature import Likelihood
from kronfac.linalg.lanczos import norm
from kronfac.optim.newton.base import (
    COMMON_OPTIONS,
    Check,
    NewtonOptimizer,
    NewtonStep,
    decrease_ratio,
    positive,
    vector,
)
from kronfac.optim.newton.evaluation import Evaluation, SampleSize
from kronfac.optim.newton.hessian_free import Trial, best_iterate, next_damping, shortened, solve
from kronfac.optim.newton.preconditioning import PreconditionerSource, Preconditioning
from kronfac.optim.options import flag, integer, number


@dataclass(frozen=True, kw_only=True)
class GaussNewtonStep(NewtonStep):
    """What a step of `GaussNewtonCG` did.

    Attributes:
        damping: λ for the next step.
        used_damping: λ of this one.
        warm: whether conjugate gradients began at the decayed solution of the step before.
        iterate: the iteration of conjugate gradients whose iterate was taken, less than `iterations` where an earlier
            one had the smaller loss. None where there was none.
        length: of the line search: the factor of the iterate, 0 where nothing moved.
        losses: how many losses were evaluated to choose the iterate and its length.
        outcome: "accepted", "rejected" (no length decreased the loss enough), "no_decrease" (the gradient is zero) or
            "unresolved" (the model promises less than the round-off of the loss; such a step is taken if the loss does
            not rise, and says nothing about λ).
    """

    damping: float
    used_damping: float
    warm: bool
    iterate: int | None
    length: float
    losses: int
    outcome: str


class GaussNewtonCG(NewtonOptimizer):
    """Hessian-free optimization (Martens, ICML 2010): (G + λI) d = -g by conjugate gradients, λ by Levenberg-Marquardt.

    With curvature="ggn" it is the generalised Gauss-Newton method, with "fisher" the natural gradient, with "hessian"
    Newton's method by conjugate gradients. Conjugate gradients begin at the decayed solution of the step before and
    end where they gain little. ρ, the decrease of the loss divided by that of the model gᵀd + ½ dᵀGd, moves λ: below ¼
    it grows by 3/2, above ¾ it falls by 2/3. The loss never rises on the sample of ρ: an earlier iterate of conjugate
    gradients is taken where it is better, then the step is shortened until it passes Armijo's test, or not taken.

        optimizer = kronfac.optim.GaussNewtonCG(model.parameters(), examples=len(x), hessian_sample=0.25)
        for _ in range(100):
            optimizer.step(lambda i: evaluate(x if i is None else x[i], y if i is None else y[i]))

    where `evaluate` returns (loss, outputs). A checkpoint holds λ, the last solution, the counters and the state of
    the samples' generator: a run resumes bit for bit, except that a callable `preconditioner` is asked anew in the
    first step after loading.

    Args:
        params: parameters or param groups, whose options may not differ.
        examples: how many examples the closure knows; needed for samples and chunks.
        curvature: G: "ggn", "fisher" or "hessian", as in `kronfac.operators.ClosureOperator`. The first two are
            positive semi-definite (for convex losses) and need a closure that returns (loss, outputs). Where G + λI
            shows non-positive curvature, conjugate gradients end with the iterate before; where there is none, λ is
            raised beyond what was shown.
        likelihood: of the outputs, for curvature="fisher".
        gradient_sample: examples that g is taken on: None for all, a float in (0, 1] for a share, an int for a number;
            drawn anew in every step, without replacement.
        hessian_sample: likewise for G.
        ratio_sample: likewise for the losses of ρ and of the line search; "gradient" for the gradient's own sample.
        chunk_size: the most examples handed to the closure at once; means are weighted by counts.
        damping: λ of the first step.
        min_damping: the smallest λ.
        max_damping: the largest λ.
        decay: of the solution that the next step's conjugate gradients begin at, or at the shorter multiple of it where
            the model is least; 0 for a start at zero.
        tolerance: of conjugate gradients, on ‖g + (G + λ)d‖ / ‖g‖. None for Martens' rule: stop when the model fell by
            less than a share 5e-4·k over the last k = max(10, i/10) of i iterations.
        max_iterations: of conjugate gradients.
        backtrack: whether earlier iterates of conjugate gradients are tried, from the last one backwards as long as the
            loss falls. Memory: about 9·log10(iterations) vectors.
        max_shortenings: how often a step is shortened by 0.8 before it is given up.
        preconditioner: M⁻¹ for conjugate gradients, positive definite, over the parameters in their order: an operator
            with `@`, like `kronfac.operators.kfac(...).inverse(damping)`, or a callable without arguments that returns
            one.
        preconditioner_every: the callable is called in every so many-th step. What it computes is not counted in
            `propagations`.
        seed: of the samples.
        history: how many records `history` holds.

    Attributes:
        last_step: `GaussNewtonStep` of the last step, None before the first.
        history: those of the last steps, oldest first; not part of checkpoints.
        steps: how many steps were made.
        propagations: example-propagations spent: n for a gradient or a loss over n examples, 2n for a product with the
            curvature over n examples; where `examples` is None, in passes over all of them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an option out of range or unknown, groups that differ, samples without `examples`.
    """

    OPTIONS: ClassVar[Mapping[str, Check]] = {
        **COMMON_OPTIONS,
        "min_damping": positive,
        "max_damping": positive,
        "decay": lambda where, value: number(where, value, high=1.0, open_high=False),
        "tolerance": lambda where, value: None if value is None else positive(where, value),
        "max_iterations": integer,
        "backtrack": flag,
        "max_shortenings": lambda where, value: integer(where, value, low=0),
        "preconditioner_every": integer,
    }
    VALUES: ClassVar[Mapping[str, Check]] = {"damping": positive, "solution": vector}

    def __init__(
        self,
        params: Iterable[Any],
        *,
        examples: int | None = None,
        curvature: str = "ggn",
        likelihood: str | Likelihood | None = None,
        gradient_sample: SampleSize = None,
        hessian_sample: SampleSize = None,
        ratio_sample: SampleSize | str = None,
        chunk_size: int | None = None,
        damping: float = 1.0,
        min_damping: float = 1e-10,
        max_damping: float = 1e10,
        decay: float = 0.95,
        tolerance: float | None = None,
        max_iterations: int = 250,
        backtrack: bool = True,
        max_shortenings: int = 40,
        preconditioner: PreconditionerSource = None,
        preconditioner_every: int = 1,
        seed: int = 0,
        history: int = 1000,
    ) -> None:
        options = {
            "curvature": curvature,
            "gradient_sample": gradient_sample,
            "hessian_sample": hessian_sample,
            "ratio_sample": ratio_sample,
            "chunk_size": chunk_size,
            "min_damping": min_damping,
            "max_damping": max_damping,
            "decay": decay,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "backtrack": backtrack,
            "max_shortenings": max_shortenings,
            "preconditioner_every": preconditioner_every,
        }
        super().__init__(
            params,
            options,
            {"damping": damping, "solution": None},
            examples=examples,
            likelihood=likelihood,
            seed=seed,
            history=history,
        )
        if not min_damping <= damping <= max_damping:
            raise ValueError(
                f"{self.method}: damping: expected at least min_damping={min_damping} and at most "
                f"max_damping={max_damping}, got {damping}"
            )
        self._preconditioning = Preconditioning(preconditioner, self.method)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of the base class; a preconditioner is made anew in the next step."""
        super().load_state_dict(state_dict)
        self._preconditioning.made = None

    def _check_further(self, where: str, options: Mapping[str, Any]) -> None:
        if options["min_damping"] > options["max_damping"]:
            raise ValueError(
                f"{where}: min_damping: expected at most max_damping={options['max_damping']}, got "
                f"{options['min_damping']}"
            )

    def _iterate(
        self, run: Evaluation, options: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[GaussNewtonStep, Mapping[str, Any]]:
        made = self._preconditioning.current(self.steps, options["preconditioner_every"], run.layout)
        gradient_sample = run.sample(options["gradient_sample"])
        hessian_sample = run.sample(options["hessian_sample"])
        ratio_sample = self._ratio_sample(run, options, gradient_sample)
        loss, gradient = run.gradient(gradient_sample)
        operator = run.operator(hessian_sample, options["curvature"], self.likelihood)
        damping = min(max(values["damping"], options["min_damping"]), options["max_damping"])
        solved = solve(operator, gradient, damping, values["solution"], options, None if made is None else made[1])
        result = solved.result
        following = solved.damping
        ratio: float | None = None
        outcome, trial = "no_decrease", Trial(None, 0.0, loss, 0)
        if result.iterates and result.iterates[-1].model_decrease > 0:
            before = loss if ratio_sample is gradient_sample else run.starting_loss(ratio_sample, "the ratio")
            unresolved = result.iterates[-1].model_decrease <= run.round_off(before)
            chosen = best_iterate(run, ratio_sample, result.iterates[-1:] if unresolved else result.iterates)
            assert chosen.iterate is not None
            ratio = decrease_ratio(before, chosen.loss, chosen.iterate.model_decrease)
            if unresolved:  # ρ is a quotient of rounding errors
                outcome = "unresolved"
                trial = chosen if chosen.loss <= before else replace(chosen, length=0.0)
            else:
                trial = shortened(run, ratio_sample, chosen, before, options["max_shortenings"])
                outcome = "accepted" if trial.length else "rejected"
                following = next_damping(following, ratio, options)
        step_norm = 0.0
        if trial.iterate is not None and trial.length:
            step = trial.iterate.step * trial.length
            step_norm = norm(step)
            run.move(step)
        self._preconditioning.made = made
        record = GaussNewtonStep(
            step=self.steps,
            loss=loss,
            loss_after=trial.loss if run.moved else loss,
            ratio=ratio,
            accepted=run.moved,
            status=result.status,
            iterations=solved.iterations,
            step_norm=step_norm,
            gradient_norm=norm(gradient),
            gradient_examples=gradient_sample.size,
            hessian_examples=hessian_sample.size,
            ratio_examples=ratio_sample.size,
            propagations=run.propagations,
            damping=following,
            used_damping=solved.damping,
            warm=result.warm,
            iterate=None if trial.iterate is None else trial.iterate.iteration,
            length=trial.length,
            losses=trial.losses,
            outcome=outcome,
        )
        solution = result.iterates[-1].step if result.iterates and options["decay"] else None
        return record, {"damping": following, "solution": solution}
