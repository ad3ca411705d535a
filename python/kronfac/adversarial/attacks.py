"""Adversarial examples: perturbations of the inputs, no larger than ε, that raise the loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.adversarial import _options
from kronfac.adversarial._gradient import IsolatedModel
from kronfac.adversarial._sets import Bounds, Box, l2_ball, linf_ball, read_bounds, unit
from kronfac.operators.program import LossFunction

_FGSM, _L2, _PGD = "kronfac.adversarial.fgsm", "kronfac.adversarial.l2", "kronfac.adversarial.pgd"


def fgsm(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Any,
    *,
    eps: float,
    bounds: Bounds = "data",
    reduction: str = "mean",
) -> Tensor:
    """Fast gradient sign method: x' = clip(x + ε sign ∇ₓL) (Goodfellow et al., arXiv:1412.6572).

    The gradient is taken in eval mode: batch normalisation uses its running statistics and does not change them,
    dropout is off. Parameters, their `.grad`, modes, buffers, hooks and all random streams are as before, and KFAC
    records nothing. |x' - x| <= ε holds exactly in the type of the inputs, and so do the bounds.

    An example whose gradient is 0 throughout (a saturated network) stays as it is.

    Args:
        model: the model, called as model(inputs).
        loss_fn: called as loss_fn(output, targets), returns a scalar.
        inputs: (N, ...), floating point, finite.
        targets: what the loss takes as its second argument.
        eps: ε, the largest change of an entry, in the units of the inputs.
        bounds: the range x' is clipped to: "data", from the least to the largest entry of these inputs; a pair
            (low, high) of numbers or of tensors that broadcast to the inputs, which then have to lie inside; None, no
            range.
        reduction: what loss_fn does over the examples, "mean" or "sum". The gradient is that of the sum, so that an
            example's does not depend on how many there are.

    Returns:
        x', shaped like the inputs, of their type, on their device, without a graph.

    Raises:
        TypeError: inputs of another kind, an argument of the wrong type, a model that cannot run on other tensors.
        ValueError: NaN or infinity in the inputs; a loss that is no finite scalar, does not depend on the inputs, or
            has no finite gradient; a negative ε; bounds with inputs outside.
    """
    return _single(_FGSM, model, loss_fn, inputs, targets, eps, bounds, reduction)


def l2(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Any,
    *,
    eps: float,
    bounds: Bounds = "data",
    reduction: str = "mean",
) -> Tensor:
    """One step along the gradient of each example: x' = clip(x + ε ∇ₓL/‖∇ₓL‖).

    ‖x' - x‖ <= ε holds exactly for each example (a leading index), and so do the bounds. What `fgsm` says of the model,
    and of examples without a gradient, holds here too.

    Args:
        model: the model, called as model(inputs).
        loss_fn: called as loss_fn(output, targets), returns a scalar.
        inputs: (N, ...), floating point, finite.
        targets: what the loss takes as its second argument.
        eps: ε, the largest Euclidean norm of an example's change, in the units of the inputs.
        bounds: as in `fgsm`.
        reduction: as in `fgsm`.

    Returns:
        x', shaped like the inputs, of their type, on their device, without a graph.

    Raises:
        TypeError, ValueError: as `fgsm`.
    """
    return _single(_L2, model, loss_fn, inputs, targets, eps, bounds, reduction)


def pgd(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Any,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    seed: int | torch.Generator = 0,
    bounds: Bounds = "data",
    reduction: str = "mean",
) -> Tensor:
    """Projected gradient: x' ← Π(x' + a sign ∇ₓL), the last of several steps (Madry et al., arXiv:1706.06083).

    Π goes back to the ball of radius ε around x, then to the bounds. With norm "l2" the step is a ∇ₓL/‖∇ₓL‖. Both sets
    are kept exactly. What `fgsm` says of the model holds here too.

    Args:
        model: the model, called as model(inputs).
        loss_fn: called as loss_fn(output, targets), returns a scalar.
        inputs: (N, ...), floating point, finite.
        targets: what the loss takes as its second argument.
        eps: ε, radius of the ball, in the units of the inputs.
        norm: of the ball: "linf", the largest change of an entry, or "l2", the Euclidean norm of an example's.
        steps: gradients taken.
        step_size: a, in the units of the inputs (default: 2.5 ε/steps, so that every point of the ball is in reach).
        random_start: begin at a point drawn uniformly from the ball, not at x.
        seed: of the random start: an integer, which gives the same start in every call, or a generator on the CPU that
            moves on. The global stream is not used.
        bounds: as in `fgsm`.
        reduction: as in `fgsm`.

    Returns:
        x', shaped like the inputs, of their type, on their device, without a graph.

    Raises:
        TypeError, ValueError: as `fgsm`; another norm; steps below 1; a step size that is not positive.
    """
    radius = _options.check_eps(eps, _PGD)
    if norm not in ("linf", "l2"):
        raise ValueError(f'{_PGD}: norm: expected "linf" or "l2", got {norm!r}')
    count = _options.check_steps(steps, _PGD)
    size = 2.5 * radius / count if step_size is None else _options.check_step_size(step_size, _PGD)
    generator = _options.check_generator(seed, _PGD)
    isolated = IsolatedModel(model, loss_fn, reduction, _PGD)
    x = _options.check_inputs(inputs, targets, _PGD)
    if not x.numel():
        return x.clone()
    box = read_bounds(bounds, x, _PGD)
    if radius == 0.0:
        return x.clone()
    ball = linf_ball(x, radius).cut(box) if norm == "linf" else None

    def project(points: Tensor) -> Tensor:
        return box.clip(l2_ball(points, x, radius)) if ball is None else ball.clip(points)

    with isolated.running():
        point = project(x + _start(x, radius, norm, generator)) if random_start else x
        for _ in range(count):
            gradient = isolated.gradient(point, targets)
            with torch.no_grad():
                point = project(point + size * (unit(gradient) if ball is None else gradient.sign()))
    return point.detach().clone()


def _single(
    caller: str,
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Any,
    eps: float,
    bounds: Bounds,
    reduction: str,
) -> Tensor:
    radius = _options.check_eps(eps, caller)
    isolated = IsolatedModel(model, loss_fn, reduction, caller)
    x = _options.check_inputs(inputs, targets, caller)
    if not x.numel():
        return x.clone()
    box = read_bounds(bounds, x, caller)
    if radius == 0.0:
        return x.clone()
    with isolated.running():
        gradient = isolated.gradient(x, targets)
    with torch.no_grad():
        if caller == _L2:
            return box.clip(l2_ball(x + radius * unit(gradient), x, radius))
        return _corner(gradient, x, linf_ball(x, radius).cut(box))


def _corner(gradient: Tensor, x: Tensor, box: Box) -> Tensor:
    """The corner of a box that the gradient points to."""
    return torch.where(gradient > 0, box.high, torch.where(gradient < 0, box.low, x))


def _start(x: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """A perturbation drawn uniformly from the ball; drawn on the CPU, so that a seed means the same on every device."""
    if norm == "linf":
        return (2.0 * eps * (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5)).to(x)
    direction = unit(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    size = math.prod(x.shape[1:])
    radius = torch.rand(len(x), generator=generator, dtype=torch.float64) ** (1.0 / size)
    return (eps * radius.view((-1,) + (1,) * (x.ndim - 1)) * direction).to(x)
