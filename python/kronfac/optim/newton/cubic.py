"""Newton's method with adaptive cubic regularisation (Cartis, Gould & Toint 2011; Xu, Roosta & Mahoney 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kronfac.curvature import Likelihood
from kronfac.linalg.cubic import CubicResult, cubic_regularised
from kronfac.linalg.lanczos import norm
from kronfac.operators.closure import ClosureOperator
from kronfac.optim.newton.attempts import Attempt, AttemptedStep
from kronfac.optim.newton.base import COMMON_OPTIONS, Check, NewtonOptimizer, decrease_ratio, positive
from kronfac.optim.newton.evaluation import Evaluation, SampleSize
from kronfac.optim.options import flag, integer, number

_SHORTER = 0.9


@dataclass(frozen=True, kw_only=True)
class CubicAttempt(Attempt):
    """One solution of the cubic problem, and what came of it.

    Attributes:
        sigma: σ.
        shift: μ = σ‖s‖, which H + μI is positive semi-definite with on the space.
        lowest: the smallest eigenvalue of H on the space, NaN where there is none.
        status: of the solver: "converged", "iteration_limit" or "stagnated".
        iterations: dimension of the Lanczos space.
        products: with the curvature that were spent: mostly 0 after the first attempt, whose space is used again.
        norm: ‖s‖.
        model_decrease: what the cubic model promises.
        loss_after: on the sample of the ratio, NaN where it was not evaluated.
        ratio: ρ, None where it was not taken.
        outcome: "accepted", "rejected", "no_decrease" or "unresolved" (the model promises less than the round-off of
            the loss).
    """

    sigma: float
    shift: float
    lowest: float


@dataclass(frozen=True, kw_only=True)
class CubicStep(AttemptedStep):
    """What a step of `CubicNewton` did; `status` is that of the last attempt.

    Attributes:
        sigma: for the next step.
        attempts: with larger and larger σ, the last one accepted or none.
        rejections: how many of them were rejected.
    """

    sigma: float
    attempts: tuple[CubicAttempt, ...]


class CubicNewton(NewtonOptimizer):
    """Adaptive cubic regularisation: in every step gᵀs + ½ sᵀHs + (σ/3)‖s‖³ is minimised over a Lanczos space.

    The cubic problem is solved globally on that space, so that directions of negative curvature are used to the full.
    The decrease of the loss divided by that of the model, ρ, decides whether the step is taken and what becomes of σ:
    ρ < eta2 rejects and doubles it, ρ < eta1 divides it by 1.2, ρ >= eta1 by 2. After a rejection the problem is
    solved again on the same space, without new products; σ is doubled on until the step is shorter by a tenth, since
    one that is hardly another would be rejected as well.

        optimizer = kronfac.optim.CubicNewton(model.parameters(), examples=len(x), hessian_sample=0.05)
        for _ in range(100):
            optimizer.step(lambda i: F.cross_entropy(model(x if i is None else x[i]), y if i is None else y[i]))

    A checkpoint holds σ, the counters and the state of the samples' generator, so that a run resumes bit for bit.

    Args:
        params: parameters or param groups, whose options may not differ.
        examples: how many examples the closure knows; needed for samples and chunks.
        curvature: H: "hessian", "ggn" or "fisher", as in `kronfac.operators.ClosureOperator`. The last two need a
            closure that returns (loss, outputs).
        likelihood: of the outputs, for curvature="fisher".
        gradient_sample: examples that g is taken on: None for all, a float in (0, 1] for a share, an int for a number;
            drawn anew in every step, without replacement.
        hessian_sample: likewise for H. Published: 0.05.
        ratio_sample: likewise for the losses of ρ; "gradient" for the gradient's own sample.
        chunk_size: the most examples handed to the closure at once; means are weighted by counts.
        sigma: σ of the first step; the default is one over the first radius of `TRCG`.
        min_sigma: the smallest σ.
        max_sigma: the largest σ.
        eta1: from this ratio on a step is very successful.
        eta2: below this ratio it is rejected.
        tolerance: of the cubic problem, on ‖∇m(s)‖ relative to ‖g‖; None for min(½, √‖g‖).
        max_iterations: the largest dimension of the Lanczos space, one product each. **Memory**: that many vectors.
        explore: also look, from a random direction, for negative curvature that g does not see, at the cost of more
            products. It leaves saddle points where g is zero.
        max_rejections: after how many rejections a step ends without moving; σ stays large then.
        seed: of the samples.
        history: how many records `history` holds.

    Attributes:
        last_step: `CubicStep` of the last step, None before the first.
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
        "min_sigma": positive,
        "max_sigma": positive,
        "eta1": lambda where, value: number(where, value, high=1.0),
        "eta2": lambda where, value: number(where, value, high=1.0),
        "tolerance": lambda where, value: None if value is None else positive(where, value),
        "max_iterations": integer,
        "explore": flag,
        "max_rejections": lambda where, value: integer(where, value, low=0),
    }
    VALUES: ClassVar[Mapping[str, Check]] = {"sigma": positive}

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
        sigma: float = 0.2,
        min_sigma: float = 1e-6,
        max_sigma: float = 1e10,
        eta1: float = 0.8,
        eta2: float = 1e-4,
        tolerance: float | None = None,
        max_iterations: int = 100,
        explore: bool = False,
        max_rejections: int = 20,
        seed: int = 0,
        history: int = 1000,
    ) -> None:
        options = {
            "curvature": curvature,
            "gradient_sample": gradient_sample,
            "hessian_sample": hessian_sample,
            "ratio_sample": ratio_sample,
            "chunk_size": chunk_size,
            "min_sigma": min_sigma,
            "max_sigma": max_sigma,
            "eta1": eta1,
            "eta2": eta2,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "explore": explore,
            "max_rejections": max_rejections,
        }
        super().__init__(
            params,
            options,
            {"sigma": sigma},
            examples=examples,
            likelihood=likelihood,
            seed=seed,
            history=history,
        )
        if not min_sigma <= sigma <= max_sigma:
            raise ValueError(
                f"{self.method}: sigma: expected at least min_sigma={min_sigma} and at most max_sigma={max_sigma}, got "
                f"{sigma}"
            )

    def _check_further(self, where: str, options: Mapping[str, Any]) -> None:
        for low, high in (("min_sigma", "max_sigma"), ("eta2", "eta1")):
            if options[low] > options[high]:
                raise ValueError(f"{where}: {low}: expected at most {high}={options[high]}, got {options[low]}")

    def _iterate(
        self, run: Evaluation, options: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[CubicStep, Mapping[str, Any]]:
        gradient_sample = run.sample(options["gradient_sample"])
        hessian_sample = run.sample(options["hessian_sample"])
        ratio_sample = self._ratio_sample(run, options, gradient_sample)
        loss, gradient = run.gradient(gradient_sample)
        before = loss if ratio_sample is gradient_sample else None
        sigma = min(max(values["sigma"], options["min_sigma"]), options["max_sigma"])
        result = self._solve(
            run.operator(hessian_sample, options["curvature"], self.likelihood), gradient, sigma, options
        )
        products = result.products
        attempts: list[CubicAttempt] = []
        while True:
            promised = result.model_decrease
            if promised <= 0:
                attempts.append(_attempt(result, products, math.nan, None, "no_decrease"))
                break
            if before is None:
                before = run.starting_loss(ratio_sample, "the ratio")
            after = run.loss(ratio_sample, result.step)
            ratio = decrease_ratio(before, after, promised)
            if promised <= run.round_off(before):  # ρ is a quotient of rounding errors
                attempts.append(_attempt(result, products, after, ratio, "unresolved"))
                if after <= before:
                    run.move(result.step)
                break
            if ratio >= options["eta2"]:
                attempts.append(_attempt(result, products, after, ratio, "accepted"))
                run.move(result.step)
                sigma = max(result.sigma / (2.0 if ratio >= options["eta1"] else 1.2), options["min_sigma"])
                break
            attempts.append(_attempt(result, products, after, ratio, "rejected"))
            sigma = min(2.0 * result.sigma, options["max_sigma"])
            if len(attempts) > options["max_rejections"] or sigma <= result.sigma:
                break
            result, products = _shorter(result, sigma, options["max_sigma"])
            sigma = result.sigma
        last = attempts[-1]
        return (
            CubicStep(
                step=self.steps,
                loss=loss,
                loss_after=last.loss_after if run.moved else loss,
                ratio=last.ratio,
                accepted=run.moved,
                status=last.status,
                iterations=sum(attempt.products for attempt in attempts),
                step_norm=last.norm if run.moved else 0.0,
                gradient_norm=norm(gradient),
                gradient_examples=gradient_sample.size,
                hessian_examples=hessian_sample.size,
                ratio_examples=ratio_sample.size,
                propagations=run.propagations,
                sigma=sigma,
                attempts=tuple(attempts),
            ),
            {"sigma": sigma},
        )

    def _solve(
        self, operator: ClosureOperator, gradient: Tensor, sigma: float, options: Mapping[str, Any]
    ) -> CubicResult:
        return cubic_regularised(
            operator,
            gradient,
            sigma,
            tolerance=options["tolerance"],
            max_iterations=options["max_iterations"],
            explore=options["explore"],
            seed=self.steps,  # another random direction in every step, the same after resuming
            keep=True,
        )


def _shorter(rejected: CubicResult, sigma: float, limit: float) -> tuple[CubicResult, int]:
    """The solution for σ, doubled until it is shorter by a tenth, and the products that this took."""
    products = 0
    while True:
        result = rejected.regularised(sigma)
        products += result.products
        if result.norm <= _SHORTER * rejected.norm or sigma >= limit:
            return result, products
        sigma = min(2.0 * sigma, limit)


def _attempt(result: CubicResult, products: int, after: float, ratio: float | None, outcome: str) -> CubicAttempt:
    return CubicAttempt(
        sigma=result.sigma,
        status=result.status,
        iterations=result.iterations,
        products=products,
        norm=result.norm,
        shift=result.shift,
        lowest=result.lowest,
        model_decrease=result.model_decrease,
        loss_after=after,
        ratio=ratio,
        outcome=outcome,
    )
