"""The fully adaptive mode: learning rate, momentum and both dampings without a knob.

Martens & Grosse, arXiv:1503.05671, sections 6.4 to 6.6 and 7, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.curvature import Likelihood, Recorder, ScaledSums
from kronfac.operators.isolation import RandomStreams, accelerator_devices
from kronfac.optim.directions import directions, plain_gradient
from kronfac.optim.groups import Groups, home_of, l2
from kronfac.optim.layers import Layer
from kronfac.optim.quadratic import Fit, QuadraticModel, inner, reduce_mean
from kronfac.optim.ranks import agree
from kronfac.optim.refresh import average, sums_finite
from kronfac.optim.replay import Replayer, reevaluated
from kronfac.optim.step import Outcome, Proposal, commit, due_for_inverse, propose
from kronfac.optim.structures import Structures
from kronfac.optim.update import MOMENTUM

DAMPING_EVERY = 5
"""T₁: steps between two updates of λ."""

GAMMA_EVERY = 20
"""T₂: steps between two choices of γ."""

DAMPING_FACTOR = (19 / 20) ** DAMPING_EVERY
"""ω₁^T₁, by which λ falls where the quadratic model is trusted, and 1/ω₁^T₁ by which it rises."""

GAMMA_FACTOR = (19 / 20) ** (GAMMA_EVERY / 2)
"""ω₂, by which the candidates for γ differ."""

SMALLEST, LARGEST = 1e-8, 1e8
"""Where λ and γ² stop of their own: long training at ρ > ¾ would take λ below the smallest number."""


@dataclass
class Adaptation:
    """What the adaptive mode adapts, and what the last step measured.

    Attributes:
        gamma: γ, whose square damps the Kronecker factors; the exact λ + η is in the quadratic model.
        damping: λ, which the param groups hold.
        rho: reduction ratio (h(θ + δ) - h(θ)) / (M(δ) - M(0)) when it was last measured; None before.
        alpha: α of the last step, its learning rate.
        mu: μ of the last step, its momentum.
        model_change: M(δ) - M(0) of the last step.
    """

    gamma: float
    damping: float
    rho: float | None = None
    alpha: float | None = None
    mu: float | None = None
    model_change: float | None = None

    @classmethod
    def start(cls, groups: Groups) -> Adaptation:
        """γ = √(λ + η), with the largest η of the groups; λ is one for all.

        Raises:
            ValueError: the groups differ in damping.
        """
        dampings = {float(group["damping"]) for group in groups}
        if len(dampings) > 1:
            raise ValueError(
                f"KFAC: damping: expected the same value in all groups with adaptive=True, got {sorted(dampings)}"
            )
        damping = dampings.pop()
        return cls(math.sqrt(damping + max(l2(group) for group in groups)), damping)

    def candidates(self, step: int) -> list[float]:
        """The values of γ to choose from at a step (0-based), the present one first."""
        if step == 0 or step % GAMMA_EVERY:
            return [self.gamma]
        return [self.gamma, _lower(self.gamma, GAMMA_FACTOR, 0.5), _raise(self.gamma, GAMMA_FACTOR, 0.5)]

    def measures(self, step: int) -> bool:
        """Whether ρ is measured after a step (0-based)."""
        return (step + 1) % DAMPING_EVERY == 0

    def trust(self, rho: float, groups: Sequence[dict[str, Any]]) -> None:
        """Levenberg-Marquardt: less damping where the quadratic model predicted well, more where it did not."""
        self.rho = rho
        if rho > 0.75:
            self._set(groups, _lower(self.damping, DAMPING_FACTOR))
        elif rho < 0.25:
            self._set(groups, _raise(self.damping, DAMPING_FACTOR))

    def distrust(self, groups: Sequence[dict[str, Any]]) -> None:
        """More damping after a step that was skipped."""
        self._set(groups, _raise(self.damping, DAMPING_FACTOR))

    def _set(self, groups: Sequence[dict[str, Any]], damping: float) -> None:
        self.damping = damping
        for group in groups:
            group["damping"] = damping


def _lower(value: float, factor: float, power: float = 1.0) -> float:
    return max(value * factor, min(value, math.pow(SMALLEST, power)))


def _raise(value: float, factor: float, power: float = 1.0) -> float:
    return min(value / factor, max(value, math.pow(LARGEST, power)))


REFUSED: Mapping[str, object] = {
    "momentum": 0.9,
    "nesterov": False,
    "decoupled": False,
    "kl_clip": 1e-3,
    "norm_constraint": None,
}
"""Options that the adaptive mode does without, with the value they have when nobody sets them."""


def check_options(where: str, group: Mapping[str, Any]) -> None:
    """Refuse what the adaptive mode chooses by itself, in the defaults or in a param group.

    Raises:
        ValueError: lr, momentum or a clip is set, or damping is a callable.
    """
    if group.get("lr") is not None:
        raise ValueError(f"{where}: lr: expected to be unset with adaptive=True, which chooses it, got {group['lr']!r}")
    for name, default in REFUSED.items():
        value = group.get(name, default)
        if value != default and not (name == "kl_clip" and value is None):
            raise ValueError(
                f"{where}: {name}: expected to be left alone with adaptive=True, which chooses step length and "
                f"momentum from the quadratic model, got {value!r}"
            )
    if callable(group.get("damping")):
        raise ValueError(f"{where}: damping: expected a number with adaptive=True, which adapts it, got a callable")


def check_method(grad_scaler: object, reduction: str) -> None:
    """Refuse what does not go with a quadratic model of the loss.

    Raises:
        ValueError: a GradScaler, or gradients of a sum.
    """
    if grad_scaler is not None:
        raise ValueError(
            "KFAC: grad_scaler: expected None with adaptive=True: the loss is compared with the quadratic model, which "
            "a scale would falsify; use bfloat16, which needs none"
        )
    if reduction != "mean":
        raise ValueError(
            f"KFAC: reduction: expected 'mean' with adaptive=True, whose quadratic model is that of a mean, got "
            f"{reduction!r}"
        )


def check_scale(scale: object, found_inf: object) -> None:
    """Refuse a step under a GradScaler.

    Raises:
        ValueError: it is one.
    """
    if scale is not None or found_inf is not None:
        raise ValueError("KFAC.step: adaptive=True: expected no GradScaler; call step(closure) on the optimizer itself")


def check_groups(groups: Groups, adaptation: Adaptation) -> None:
    """Refuse a step for which something else has moved what the adaptive mode chooses.

    Raises:
        ValueError: an lr scheduler is at work, or options were changed.
    """
    for index, group in enumerate(groups):
        where = f"KFAC: params[{index}]"
        if "initial_lr" in group or group["lr"] != 1.0:
            raise ValueError(f"{where}: lr: adaptive=True chooses the learning rate; take the scheduler away")
        check_options(where, {name: group[name] for name in REFUSED})
        if group["damping"] != adaptation.damping:
            if len({other["damping"] for other in groups}) > 1:
                raise ValueError(f"{where}: damping: expected the same value in all groups with adaptive=True")
            adaptation.damping = group["damping"]


class Trial:
    """A closure at the parameters of the present step, and again at others.

    Args:
        closure: what the user handed to `step`.
        replayer: that remembers its forwards.
        recorder: of the model.
        model: that the closure runs.
        parameters: of the optimizer.

    Attributes:
        returned: what the closure returned first.
        loss: the same as a number.
        replayer: holds the forwards of the first evaluation.

    Raises:
        ValueError: there is no closure.
        TypeError: it does not return a loss.
        RuntimeError: it did not call the model.
    """

    def __init__(
        self,
        closure: Callable[[], Any] | None,
        replayer: Replayer,
        recorder: Recorder,
        model: nn.Module,
        parameters: Sequence[Tensor],
    ) -> None:
        if closure is None:
            raise ValueError(
                "KFAC.step: closure: expected one with adaptive=True, which evaluates the loss again; pass a function "
                "that clears the gradients, computes the loss, calls backward and returns the loss"
            )
        self._closure, self._recorder, self._model, self._parameters = closure, recorder, model, parameters
        self.replayer = replayer
        self._start = RandomStreams(accelerator_devices(model))
        kind = parameters[0].device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.enable_grad(), replayer.listening(recorder):
            self.returned = closure()
        self.loss = _number(self.returned)
        if not replayer.calls:
            raise RuntimeError(
                "KFAC.step: adaptive=True: the closure did not call the model (or only under no_grad, compiled, or "
                "not through model(...) itself); the quadratic model needs the forwards that the loss comes from"
            )

    def again(self) -> float:
        """The loss at the parameters as they are now, from the same random numbers, leaving nothing behind."""
        kind, dtype, enabled = self._autocast
        with (
            reevaluated(self._model, self._parameters, self._recorder, self._start),
            torch.autocast(kind, dtype=dtype, enabled=enabled),
        ):
            return _number(self._closure())


def _number(loss: object) -> float:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return float(loss)
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise TypeError(f"KFAC.step: closure: expected it to return the loss with adaptive=True, got {got}")


def advance_adaptively(
    adaptation: Adaptation,
    *,
    structure: Structures,
    layers: Sequence[Layer],
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    fresh: Mapping[str, ScaledSums],
    factor_decay: float,
    step: int,
    likelihood: Likelihood,
    trial: Trial,
) -> Outcome:
    """Take one step δ = αΔ + μδ₀ to the minimum of the quadratic model, Δ the preconditioned negative gradient.

    Like `kronfac.optim.step.advance`, except that a step is called off as well when the loss, before or after it, or
    the quadratic model is not finite; λ is then raised.

    Args:
        adaptation: λ, γ and what is measured; changed.
        structure: how factors are inverted and applied.
        layers: the covered layers; factors and factorisations are replaced.
        groups: checked param groups; the parameters and λ are changed in place.
        state: momentum buffers, which hold -δ₀.
        fresh: this step's statistics by layer name.
        factor_decay: long-run decay of the averages.
        step: 0-based number of this step.
        likelihood: of the model's output.
        trial: the closure, evaluated once.
    """
    home = home_of(groups)
    flags = [*sums_finite(fresh.values()), math.isfinite(trial.loss)]
    if not agree(flags, home):
        adaptation.distrust(groups)
        return Outcome(applied=False, cause="" if math.isfinite(trial.loss) else "the loss is")
    averages = average(layers, fresh, factor_decay)
    moving = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
    parameters = [p for p, _ in moving]
    decays = [l2(group) for _, group in moving]
    gradients = [plain_gradient(p, decay) for p, decay in zip(parameters, decays, strict=True)]
    buffers = [state[p].get(MOMENTUM) if p in state else None for p in parameters]
    previous = [None if buffer is None else -buffer for buffer in buffers]
    ridge = [adaptation.damping + decay for decay in decays]
    model = QuadraticModel(trial.replayer, likelihood, parameters, gradients, previous, ridge)

    candidates = adaptation.candidates(step)
    if len(candidates) > 1:
        due = [layer for layer in layers if layer.factors is not None or layer.name in averages]
    else:
        due = due_for_inverse(layers, averages, groups, step)
    best: tuple[Fit, float, Proposal, list[Tensor]] | None = None
    retries = failures = 0
    cause = ""
    for gamma in candidates:
        own = propose(structure, layers, groups, averages, due, _damped_by(gamma))
        retries, failures = retries + own.retries, max(failures, own.failures)
        if not agree(own.finite(groups), home):
            continue
        found = directions(own.ready, own.done.matrices, groups, [None] * len(own.ready))
        delta = [-found[id(p)][0] for p in parameters]
        fit = model.fit(delta) if parameters else Fit(0.0, 0.0, 0.0)
        if not fit.finite:
            cause = "the quadratic model is"
        elif best is None or fit.change < best[0].change:
            best = fit, gamma, own, delta
    if best is None:
        adaptation.distrust(groups)
        return Outcome(applied=False, cause=cause)
    fit, gamma, own, delta = best

    torch._foreach_mul_(delta, fit.alpha)
    for position, old in enumerate(previous):
        if old is not None:
            delta[position].add_(old, alpha=fit.mu)
    rho = None
    if adaptation.measures(step):
        kept = [p.detach().clone() for p in parameters]
        torch._foreach_add_(parameters, delta)
        try:
            change = _loss_change(trial, model.terms, kept, delta, decays)
        except BaseException:
            torch._foreach_copy_(parameters, kept)
            raise
        if not math.isfinite(change):
            torch._foreach_copy_(parameters, kept)
            adaptation.distrust(groups)
            return Outcome(applied=False, cause="the loss after the step is")
        rho = change / fit.change if fit.change else None
    else:
        torch._foreach_add_(parameters, delta)

    commit(layers, own, step)
    for p, moved in zip(parameters, delta, strict=True):
        state[p][MOMENTUM] = -moved
    adaptation.gamma, adaptation.alpha, adaptation.mu = gamma, fit.alpha, fit.mu
    adaptation.model_change = fit.change
    if rho is not None:
        adaptation.trust(rho, groups)
    nothing: list[Tensor | None] = [None] * len(groups)
    return Outcome(True, retries, failures, nothing, nothing, own.bare)


def _loss_change(
    trial: Trial, terms: float, before: Sequence[Tensor], moves: Sequence[Tensor], decays: Sequence[float]
) -> float:
    """h(θ + δ) - h(θ) with θ + δ in place, over all ranks; the L2 term as ⟨θ, δ⟩ + ½⟨δ, δ⟩, which does not cancel."""
    decayed: Tensor | float = 0.0
    if any(decays):
        decayed = inner(before, moves, decays) + inner(moves, moves, [decay / 2 for decay in decays])
    change, weight, regulariser = reduce_mean([(trial.again() - trial.loss) * terms, terms, decayed], 3)
    return change / weight + regulariser


def _damped_by(gamma: float) -> Callable[[Layer], float]:
    """γ where √λ stands otherwise: factored damping splits γ, exact damping adds γ²."""
    return lambda _: gamma**2
