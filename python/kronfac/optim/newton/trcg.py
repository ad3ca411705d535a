"""Trust-region Newton-CG, on all the data or on samples (Steihaug-Toint; Xu, Roosta & Mahoney, arXiv:1708.07827)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kronfac.curvature import Likelihood
from kronfac.linalg.lanczos import norm
from kronfac.linalg.trust_region import TrustRegionResult, trust_region_cg
from kronfac.optim.newton.attempts import Attempt, AttemptedStep
from kronfac.optim.newton.base import COMMON_OPTIONS, Check, NewtonOptimizer, decrease_ratio, positive
from kronfac.optim.newton.evaluation import Evaluation, SampleSize
from kronfac.optim.newton.preconditioning import PreconditionerSource, Preconditioning
from kronfac.optim.newton.radius import CLASSICAL, XU, rule_from
from kronfac.optim.options import choice, integer, number


@dataclass(frozen=True, kw_only=True)
class TrustRegionAttempt(Attempt):
    """One solution of the trust-region problem, and what came of it.

    Attributes:
        radius: of the region.
        status: of the solver: "interior", "boundary", "negative_curvature" or "iteration_limit".
        iterations: of conjugate gradients on the way to the step.
        products: with the curvature that were spent: 0 where the step was read off the path of the attempt before.
        norm: of the step, with a preconditioner in its norm √(sᵀMs).
        model_decrease: what the quadratic model promises.
        loss_after: on the sample of the ratio, NaN where it was not evaluated.
        ratio: ρ, None where it was not taken.
        outcome: "accepted", "rejected", "no_decrease" or "unresolved" (the model promises less than the round-off of
            the loss).
    """

    radius: float


@dataclass(frozen=True, kw_only=True)
class TrustRegionStep(AttemptedStep):
    """What a step of `TRCG` did; `status` is that of the last attempt.

    Attributes:
        radius: for the next step.
        attempts: with smaller and smaller radii, the last one accepted or none.
        rejections: how many of them were rejected.
    """

    radius: float
    attempts: tuple[TrustRegionAttempt, ...]


class TRCG(NewtonOptimizer):
    """Newton's method in a trust region whose problems are solved by conjugate gradients (Steihaug 1983, Toint 1981).

    In every step gᵀs + ½ sᵀHs is minimised over ‖s‖ <= Δ approximately, with products Hv only, so that H may be
    indefinite and large. The decrease of the loss divided by that of the model, ρ, decides whether the step is taken
    and what becomes of Δ. After a rejection the problem is solved again with the same g and H within the same step;
    mostly that costs no products. With samples for g, H or ρ it is the stochastic method (STRCG).

        optimizer = kronfac.optim.TRCG(model.parameters(), examples=len(x), hessian_sample=0.05)
        for _ in range(100):
            optimizer.step(lambda i: F.cross_entropy(model(x if i is None else x[i]), y if i is None else y[i]))

    A checkpoint holds the radius, the counters and the state of the samples' generator, so that a run resumes bit for
    bit. What `preconditioner` made is not in it: it is made anew in the first step after loading.

    Args:
        params: parameters or param groups, whose options may not differ.
        examples: how many examples the closure knows; needed for samples and chunks.
        curvature: H: "hessian", "ggn" or "fisher", as in `kronfac.operators.ClosureOperator`. The last two are positive
            semi-definite (for convex losses) and need a closure that returns (loss, outputs).
        likelihood: of the outputs, for curvature="fisher".
        gradient_sample: examples that g is taken on: None for all, a float in (0, 1] for a share, an int for a number;
            drawn anew in every step, without replacement.
        hessian_sample: likewise for H. Published: 0.05.
        ratio_sample: likewise for the losses of ρ; "gradient" for the gradient's own sample, which makes the difference
            of the two losses a paired one, of little noise.
        chunk_size: the most examples handed to the closure at once; means are weighted by counts.
        radius: Δ of the first step, in the units of the parameters.
        max_radius: the largest Δ.
        radius_rule: "xu" (Xu, Roosta & Mahoney): ρ < eta2 rejects and divides Δ by gamma1, ρ < eta1 multiplies it by
            gamma2, ρ >= eta1 by gamma1. "classical" (Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 4.1):
            ρ < ¼ divides Δ by 4, ρ > ¾ doubles it if the step ended on the boundary, ρ < eta2 rejects.
        eta1: for "xu", default 0.8.
        eta2: for both, in [0, ¼).
        gamma1: for "xu", > 1, default 2.
        gamma2: for "xu", >= 1, default 1.2.
        tolerance: of conjugate gradients, on ‖g + Hs‖ / ‖g‖; None for min(½, √‖g‖).
        max_iterations: of conjugate gradients.
        max_rejections: after how many rejections a step ends without moving; Δ stays small then.
        preconditioner: M⁻¹ for conjugate gradients, positive definite, over the parameters in their order: an operator
            with `@`, like `kronfac.operators.kfac(...).inverse(damping)`, or a callable without arguments that returns
            one. The region is then that of √(sᵀMs), and Δ in its units.
        preconditioner_every: the callable is called in every so many-th step. What it computes is not counted in
            `propagations`.
        keep_iterates: how many of the last iterates of conjugate gradients are kept within a step to read steps of
            smaller radii off, n numbers each; 0 solves again instead.
        seed: of the samples.
        history: how many records `history` holds.

    Attributes:
        last_step: `TrustRegionStep` of the last step, None before the first.
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
        "max_radius": positive,
        "radius_rule": lambda where, value: choice(where, value, (XU, CLASSICAL)),
        "eta1": lambda where, value: None if value is None else number(where, value, high=1.0),
        "eta2": lambda where, value: number(where, value, high=0.25),
        "gamma1": lambda where, value: None if value is None else number(where, value, low=1.0, open_low=True),
        "gamma2": lambda where, value: None if value is None else number(where, value, low=1.0),
        "tolerance": lambda where, value: None if value is None else positive(where, value),
        "max_iterations": integer,
        "max_rejections": lambda where, value: integer(where, value, low=0),
        "preconditioner_every": integer,
        "keep_iterates": lambda where, value: integer(where, value, low=0),
    }
    VALUES: ClassVar[Mapping[str, Check]] = {"radius": positive}

    def __init__(
        self,
        params: Iterable[Any],
        *,
        examples: int | None = None,
        curvature: str = "hessian",
        likelihood: str | Likelihood | None = None,
        gradient_sample: SampleSize = None,
        hessian_sample: SampleSize = None,
        ratio_sample: SampleSize | str = None,
        chunk_size: int | None = None,
        radius: float = 5.0,
        max_radius: float = 20.0,
        radius_rule: str = XU,
        eta1: float | None = None,
        eta2: float = 1e-4,
        gamma1: float | None = None,
        gamma2: float | None = None,
        tolerance: float | None = None,
        max_iterations: int = 250,
        max_rejections: int = 10,
        preconditioner: PreconditionerSource = None,
        preconditioner_every: int = 1,
        keep_iterates: int = 8,
        seed: int = 0,
        history: int = 1000,
    ) -> None:
        options = {
            "curvature": curvature,
            "gradient_sample": gradient_sample,
            "hessian_sample": hessian_sample,
            "ratio_sample": ratio_sample,
            "chunk_size": chunk_size,
            "max_radius": max_radius,
            "radius_rule": radius_rule,
            "eta1": eta1,
            "eta2": eta2,
            "gamma1": gamma1,
            "gamma2": gamma2,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "max_rejections": max_rejections,
            "preconditioner_every": preconditioner_every,
            "keep_iterates": keep_iterates,
        }
        super().__init__(
            params,
            options,
            {"radius": radius},
            examples=examples,
            likelihood=likelihood,
            seed=seed,
            history=history,
        )
        if radius > max_radius:
            raise ValueError(f"TRCG: radius: expected at most max_radius={max_radius}, got {radius}")
        self._preconditioning = Preconditioning(preconditioner, self.method)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of the base class; a preconditioner is made anew in the next step."""
        super().load_state_dict(state_dict)
        self._preconditioning.made = None

    def _check_further(self, where: str, options: Mapping[str, Any]) -> None:
        rule_from(options, where)

    def _iterate(
        self, run: Evaluation, options: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[TrustRegionStep, Mapping[str, Any]]:
        rule = rule_from(options, self.method)
        made = self._preconditioning.current(self.steps, options["preconditioner_every"], run.layout)
        gradient_sample = run.sample(options["gradient_sample"])
        hessian_sample = run.sample(options["hessian_sample"])
        ratio_sample = self._ratio_sample(run, options, gradient_sample)
        loss, gradient = run.gradient(gradient_sample)
        before = loss if ratio_sample is gradient_sample else None
        operator = run.operator(hessian_sample, options["curvature"], self.likelihood)
        radius = min(values["radius"], options["max_radius"])
        attempts: list[TrustRegionAttempt] = []
        result: TrustRegionResult | None = None
        while len(attempts) <= options["max_rejections"]:
            result = None if result is None else result.shortened(radius)
            if result is None:
                result = trust_region_cg(
                    operator,
                    gradient,
                    radius,
                    tolerance=options["tolerance"],
                    max_iterations=options["max_iterations"],
                    preconditioner=None if made is None else made[1],
                    keep=options["keep_iterates"] if options["max_rejections"] else 0,
                )
            promised = result.model_decrease
            if promised <= 0:
                attempts.append(_attempt(result, radius, math.nan, None, "no_decrease"))
                break
            if before is None:
                before = run.starting_loss(ratio_sample, "the ratio")
            after = run.loss(ratio_sample, result.step)
            ratio = decrease_ratio(before, after, promised)
            if promised <= run.round_off(before):  # ρ is a quotient of rounding errors
                attempts.append(_attempt(result, radius, after, ratio, "unresolved"))
                if after <= before:
                    run.move(result.step)
                break
            if rule.accepts(ratio):
                attempts.append(_attempt(result, radius, after, ratio, "accepted"))
                run.move(result.step)
                radius = rule.accepted(radius, ratio, at_boundary=result.at_boundary)
                break
            attempts.append(_attempt(result, radius, after, ratio, "rejected"))
            radius = rule.rejected(radius)
            while radius >= result.norm:  # the problem would have the same solution
                radius = rule.rejected(radius)
        last = attempts[-1]
        self._preconditioning.made = made
        assert result is not None
        return (
            TrustRegionStep(
                step=self.steps,
                loss=loss,
                loss_after=last.loss_after if run.moved else loss,
                ratio=last.ratio,
                accepted=run.moved,
                status=last.status,
                iterations=sum(attempt.products for attempt in attempts),
                step_norm=norm(result.step) if run.moved else 0.0,
                gradient_norm=norm(gradient),
                gradient_examples=gradient_sample.size,
                hessian_examples=hessian_sample.size,
                ratio_examples=ratio_sample.size,
                propagations=run.propagations,
                radius=radius,
                attempts=tuple(attempts),
            ),
            {"radius": radius},
        )


def _attempt(
    result: TrustRegionResult, radius: float, after: float, ratio: float | None, outcome: str
) -> TrustRegionAttempt:
    return TrustRegionAttempt(
        radius=radius,
        status=result.status,
        iterations=result.iterations,
        products=result.products,
        norm=result.norm,
        model_decrease=result.model_decrease,
        loss_after=after,
        ratio=ratio,
        outcome=outcome,
    )
