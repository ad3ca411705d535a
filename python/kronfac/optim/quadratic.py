"""The quadratic model of the loss that decides learning rate and momentum.

Martens & Grosse, arXiv:1503.05671, sections 6.4 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac.curvature import Likelihood
from kronfac.optim.ranks import world_size
from kronfac.optim.replay import Replayer

_COLLINEAR = 1e-12
"""1 - cos² below which two directions count as one: the rest is rounding error of their products."""


@dataclass(frozen=True)
class Fit:
    """The minimum of the quadratic model over δ = αΔ + μδ₀.

    Attributes:
        alpha: α.
        mu: μ, 0 without δ₀.
        change: M(δ) - M(0), never positive; NaN where something was not finite.
    """

    alpha: float
    mu: float
    change: float

    @property
    def finite(self) -> bool:
        """Whether all of it is."""
        return math.isfinite(self.alpha) and math.isfinite(self.mu) and math.isfinite(self.change)


def minimise(quadratic: Sequence[float], linear: Sequence[float]) -> Fit:
    """Minimise ½ cᵀQc + bᵀc over c = (α, μ).

    Args:
        quadratic: Q₀₀, Q₀₁, Q₁₁ of a positive semi-definite Q.
        linear: b₀, b₁.

    Returns:
        The minimum. A direction without curvature is not taken; of two parallel ones the first alone is.
    """
    q00, q01, q11 = quadratic
    b0, b1 = linear
    if not all(map(math.isfinite, (q00, q01, q11, b0, b1))):
        return Fit(math.nan, math.nan, math.nan)
    alpha = mu = 0.0
    if q00 > 0 and q11 > 0 and 1 - (q01 / q00) * (q01 / q11) > _COLLINEAR:
        # In directions of unit curvature, where the two scales cannot overflow against each other.
        s0, s1 = math.sqrt(q00), math.sqrt(q11)
        r, u, v = q01 / (s0 * s1), b0 / s0, b1 / s1
        rest = 1 - r * r
        alpha, mu = -(u - r * v) / rest / s0, -(v - r * u) / rest / s1
    elif q00 > 0:
        alpha = -b0 / q00
    elif q11 > 0:
        mu = -b1 / q11
    return Fit(alpha, mu, 0.5 * (alpha * b0 + mu * b1))


class QuadraticModel:
    """M(δ) - M(0) = ∇hᵀδ + ½ δᵀ(F + λ + η)δ at the present parameters, along directions given parameter by parameter.

    F is the exact Fisher matrix of the closure's forwards over all parameters that move, those without a layer adapter
    included, averaged over the terms of the loss. It enters through products only: J v in forward mode and the Fisher
    matrix of the likelihood. Under a process group everything is averaged over the ranks, so that all have the same
    numbers.

    Args:
        replayer: holds the forwards.
        likelihood: what the loss is the negative logarithm of.
        parameters: that move.
        gradients: ∇h of each, with the L2 term.
        previous: δ₀ of each, None where there is none.
        ridge: λ + η of each.

    Attributes:
        terms: of the loss on this rank, once something was fitted.
    """

    def __init__(
        self,
        replayer: Replayer,
        likelihood: Likelihood,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        previous: Sequence[Tensor | None],
        ridge: Sequence[float],
    ) -> None:
        self._replayer, self._likelihood = replayer, likelihood
        self._parameters, self._gradients, self._ridge = parameters, gradients, ridge
        self._previous = [
            torch.zeros_like(p) if old is None else old for p, old in zip(parameters, previous, strict=True)
        ]
        self._moved = any(old is not None for old in previous)
        self._along_previous: list[tuple[Tensor, Tensor]] = []  # J δ₀ and H J δ₀ of every forward
        self.terms = 0.0

    def fit(self, direction: Sequence[Tensor]) -> Fit:
        """The best step in the plane of Δ and δ₀. The host waits for the device once."""
        sums = self._fisher(direction)
        flat = [inner(direction, self._gradients), inner(direction, direction, self._ridge)]
        if self._moved:
            flat.append(inner(self._previous, self._gradients))
            flat.append(inner(direction, self._previous, self._ridge))
            flat.append(inner(self._previous, self._previous, self._ridge))
        f00, f01, f11, terms, b0, r00, b1, r01, r11 = reduce_mean([*sums, *flat], 9)
        if terms <= 0:
            return Fit(math.nan, math.nan, math.nan)
        return minimise((f00 / terms + r00, f01 / terms + r01, f11 / terms + r11), (b0, b1))

    def _fisher(self, direction: Sequence[Tensor]) -> list[Tensor | float]:
        """ΔᵀFΔ, ΔᵀFδ₀ and δ₀ᵀFδ₀ as sums over terms, and the number of terms."""
        delta = dict(zip(self._parameters, direction, strict=True))
        previous = dict(zip(self._parameters, self._previous, strict=True))
        first = self._moved and not self._along_previous
        totals: list[Tensor | float] = [0.0, 0.0, 0.0]
        terms = 0.0
        for position, call in enumerate(self._replayer.calls):
            pushed = self._replayer.push(call, [delta, previous] if first else [delta])
            logits, mask = pushed.logits, pushed.mask
            self._likelihood.check(logits)
            if mask is not None:
                self._likelihood.check_mask(logits, mask)
            terms += float(self._likelihood.terms(logits, mask))
            u = pushed.tangents[0]
            totals[0] = totals[0] + _dot(u, self._likelihood.fisher_product(logits, u, mask))
            if first:
                old = pushed.tangents[1]
                self._along_previous.append((old, self._likelihood.fisher_product(logits, old, mask)))
            if self._moved:
                old, product = self._along_previous[position]
                totals[1] = totals[1] + _dot(u, product)
                totals[2] = totals[2] + _dot(old, product)
        self.terms = terms
        return [*totals, terms]


def inner(one: Sequence[Tensor], other: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Σ w ⟨a, b⟩ over two lists of tensors: a tensor () on the first one's device, in at least float32."""
    parts = [_dot(a, b) for a, b in zip(one, other, strict=True)]
    if weights is not None:
        parts = [part * weight for part, weight in zip(parts, weights, strict=True)]
    home = parts[0].device
    return torch.stack([part.to(home, non_blocking=True) for part in parts]).sum()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return torch.dot(a.detach().reshape(-1).to(wide), b.detach().reshape(-1).to(wide))


def reduce_mean(values: Sequence[Tensor | float], size: int) -> list[float]:
    """Read numbers from the device, averaged over the ranks of a process group; one wait.

    Args:
        values: tensors () or numbers.
        size: length of the result, which zeros are appended to reach.
    """
    home = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
    wide = torch.float32 if home.type == "mps" else torch.float64
    joined = torch.stack([torch.as_tensor(value).to(home, wide, non_blocking=True) for value in values])
    if (ranks := world_size()) > 1:
        torch.distributed.all_reduce(joined)
        joined /= ranks
    return [*joined.tolist(), *[0.0] * (size - len(values))]
