"""Where perturbed examples may lie: boxes and balls that are kept to the last bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bound = float | Tensor
Bounds = Literal["data"] | tuple[Bound, Bound] | None
"""The range of inputs: "data", a pair (low, high) of numbers or of tensors that broadcast to the inputs, or None."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Box:
    """low <= x <= high, elementwise.

    Attributes:
        low: broadcasts to the examples.
        high: likewise.
    """

    low: Tensor
    high: Tensor

    def clip(self, points: Tensor) -> Tensor:
        """The nearest points inside."""
        return torch.minimum(torch.maximum(points, self.low), self.high)

    def cut(self, other: Box) -> Box:
        """What lies in both."""
        return Box(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))


def read_bounds(bounds: Bounds, inputs: Tensor, caller: str) -> Box:
    """The range that perturbed inputs are clipped to; the inputs themselves lie inside.

    Args:
        bounds: "data" for the least and the largest of all these numbers, a pair, or None for no range.
        inputs: (N, ...), not empty.
        caller: the public function that error messages name.

    Raises:
        TypeError: something else.
        ValueError: a range without an inside, of NaN, of another shape, or with inputs outside of it.
    """
    if bounds is None:
        return Box(inputs.new_full((), -math.inf), inputs.new_full((), math.inf))
    if isinstance(bounds, str):
        if bounds != "data":
            raise ValueError(f'{caller}: bounds: expected "data", None or a pair (low, high), got {bounds!r}')
        return Box(inputs.amin(), inputs.amax())
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f'{caller}: bounds: expected "data", None or a pair (low, high), got {bounds!r}')
    box = Box(_bound(bounds[0], "low", inputs, caller), _bound(bounds[1], "high", inputs, caller))
    if (box.low > box.high).any():
        raise ValueError(f"{caller}: bounds: low is above high: {_show(box.low)} and {_show(box.high)}")
    if (inputs < box.low).any() or (inputs > box.high).any():
        raise ValueError(
            f"{caller}: bounds: the inputs reach from {inputs.amin():g} to {inputs.amax():g}, beyond the bounds "
            f'{_show(box.low)} and {_show(box.high)}; give the range in the units of the inputs, or "data"'
        )
    return box


def _bound(value: object, name: str, inputs: Tensor, caller: str) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{caller}: bounds: expected a number or a tensor as {name}, got {type(value).__name__}")
    bound = torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device).detach()
    if torch.isnan(bound).any():
        raise ValueError(f"{caller}: bounds: {name} holds NaN")
    try:
        fits = torch.broadcast_shapes(bound.shape, inputs.shape) == inputs.shape  # type: ignore[no-untyped-call]
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{caller}: bounds: {name} of shape {tuple(bound.shape)} does not broadcast to the inputs, "
            f"{tuple(inputs.shape)}"
        )
    return bound


def _show(bound: Tensor) -> str:
    return f"{bound.item():g}" if bound.numel() == 1 else f"{bound.amin():g} ... {bound.amax():g}"


def linf_ball(centre: Tensor, eps: float) -> Box:
    """All numbers of the type that differ from the centre by at most eps, exactly: x + eps itself may be rounded up."""
    radius = torch.as_tensor(eps, dtype=centre.dtype, device=centre.device)
    if float(radius) > eps:  # rounded to the type
        radius = _next_down(radius)
    return Box(-_sum_rounded_down(-centre, radius), _sum_rounded_down(centre, radius))


def l2_ball(points: Tensor, centre: Tensor, eps: float) -> Tensor:
    """Points brought into the balls of radius eps around the centres, one per example; those inside stay.

    The distance that is kept is that of the numbers as they are stored, computed in float64.

    Args:
        points: (N, ...).
        centre: (N, ...).
        eps: radius.
    """
    moved = points
    offset = points.double() - centre.double()
    margin = 4.0 * torch.finfo(points.dtype).eps
    shape = (-1,) + (1,) * (points.ndim - 1)
    while True:
        length = lengths(moved.double() - centre.double())
        outside = length > eps
        if not outside.any():
            return moved
        # Rounding to the type can carry a point out again: come in a little further each time, at last to the centre.
        scale = max(0.0, 1.0 - margin) * eps / lengths(offset).clamp_min(torch.finfo(torch.float64).tiny)
        inner = (centre.double() + offset * scale.view(shape)).to(points.dtype)
        moved = torch.where(outside.view(shape), inner, moved)
        margin *= 2.0


def lengths(rows: Tensor) -> Tensor:
    """The Euclidean norm of each example, (N,)."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1) if rows.ndim > 1 else rows.abs()


def unit(rows: Tensor) -> Tensor:
    """Each example divided by its Euclidean norm; 0 stays 0.

    Divided by the largest entry first: the squares of tiny gradients, those of examples that a network is sure of,
    would be 0 in single precision.
    """
    shape = (-1,) + (1,) * (rows.ndim - 1)
    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    largest = flat.abs().amax(dim=1, keepdim=True) if flat.shape[1] else flat.new_ones(len(flat), 1)
    scaled = torch.where(largest > 0, flat / largest, 0.0)
    norm = torch.linalg.vector_norm(scaled, dim=1).clamp_min(1.0)  # the largest entry is 1, or all are 0
    result: Tensor = scaled.view(rows.shape) / norm.view(shape)
    return result


def _sum_rounded_down(x: Tensor, y: Tensor) -> Tensor:
    """The sum rounded towards minus infinity; the rounding error of the sum is itself a number of the type (Knuth)."""
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    return torch.where(error < 0, _next_down(total), total)


def _next_down(values: Tensor) -> Tensor:
    """The next smaller number of the type (`torch.nextafter` has no float16)."""
    kind = _INTEGERS[values.element_size()]
    bits = values.contiguous().view(kind)
    least = torch.iinfo(kind).min  # the bits of -0; one more is the negative number nearest to 0
    stepped = torch.where(values > 0, bits - 1, torch.where(values < 0, bits + 1, least + 1))
    return stepped.to(kind).view(values.dtype)
