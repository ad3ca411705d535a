"""From a direction to new parameters: KL clip, weight decay, momentum. No host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronfac.optim import reading

MOMENTUM = "momentum_buffer"
"""Key of the momentum buffer in the optimizer's state, as in torch.optim.SGD."""


def kl_scales(dots: Sequence[Tensor], lrs: Sequence[float], clips: Sequence[float | None]) -> list[Tensor | None]:
    """Factor by which the KL clip scales each set of preconditioned gradients.

    ν_j = min(1, √(κ_j / Σ_i lr_i² dots_i)), the sum over all sets that are clipped (Ba, Grosse & Martens 2017). With
    one κ this is the usual clip over all layers; sets with different κ share the sum and differ in κ only.

    Args:
        dots: ⟨P_l, V_l⟩ of the layers of each set, of any shape, on any devices.
        lrs: learning rate per set.
        clips: κ per set; None leaves the set alone and out of the sum.

    Returns:
        ν per set on the device of its dot; None where κ is None. 1 when every learning rate is 0.
    """
    clipped = [index for index, clip in enumerate(clips) if clip is not None]
    if not clipped:
        return [None] * len(clips)
    scales: list[Tensor | None] = [None] * len(clips)
    if all(reading.at_hand(dots[index]) for index in clipped):
        sums = sum(sum(dots[index].flatten().tolist()) * lrs[index] * lrs[index] for index in clipped)
        for index in clipped:
            clip = clips[index]
            assert clip is not None
            scale = 1.0 if sums <= 0 else min(math.sqrt(clip / sums), 1.0)
            scales[index] = torch.full((), scale, dtype=dots[index].dtype)
        return scales
    home = dots[clipped[0]].device
    total = torch.stack([reading.brought(dots[index].sum() * lrs[index] ** 2, home) for index in clipped]).sum()
    # The sum is a sum of squares in exact arithmetic; rounding may leave it just below zero, and κ/0 gives ν = 1.
    total = total.clamp(min=0)
    for index in clipped:
        clip = clips[index]
        assert clip is not None
        scales[index] = reading.brought((clip / total).sqrt().clamp(max=1), dots[index].device)
    return scales


def norm_scales(squares: Sequence[Tensor], bounds: Sequence[float | None]) -> list[Tensor | None]:
    """Factor by which the norm constraint scales each set of directions.

    n_j = min(1, c_j / √(Σ_i squares_i)), the sum over all sets that are bounded: with one bound c the norm of all
    directions together is at most c; sets with different bounds share the sum.

    Args:
        squares: squared Euclidean norm per set, 0-dimensional, on any devices.
        bounds: c per set; None leaves the set alone and out of the sum.

    Returns:
        n per set, dtype and device of its square; None where the bound is None.
    """
    bounded = [index for index, bound in enumerate(bounds) if bound is not None]
    scales: list[Tensor | None] = [None] * len(bounds)
    if not bounded:
        return scales
    home = squares[bounded[0]].device
    norm = torch.stack([reading.brought(squares[index], home) for index in bounded]).sum().sqrt()
    for index in bounded:
        bound = bounds[index]
        assert bound is not None
        scales[index] = reading.brought((bound / norm).clamp(max=1), squares[index].device, squares[index].dtype)
    return scales


def add_weight_decay(
    gradient: Tensor, weight: Tensor, decays: Sequence[float], sizes: Sequence[int], axis: int = -1
) -> Tensor:
    """Gradient matrix of the L2-regularised loss, V + ηW.

    Args:
        gradient: V; never changed.
        weight: W of the same shape.
        decays: η of each parameter that the matrix is made of.
        sizes: how many entries of `axis` each of these parameters takes, in order.
        axis: along which the parameters lie.
    """
    if not any(decays):
        return gradient
    weight = weight.to(gradient.dtype)
    if len(set(decays)) == 1:
        return gradient.add(weight, alpha=decays[0])
    parts = zip(
        torch.split_with_sizes(gradient, list(sizes), axis),
        torch.split_with_sizes(weight, list(sizes), axis),
        decays,
        strict=True,
    )
    return torch.cat([v.add(w, alpha=decay) for v, w, decay in parts], axis)


def apply_update(
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    scales: Sequence[Tensor | None] | None = None,
    good: Tensor | None = None,
) -> None:
    """Update the parameters of one param group along -direction, with momentum as in torch.optim.SGD.

    buffer ← momentum·buffer + d;  d ← d + momentum·buffer with `nesterov`, else buffer;  θ ← θ - lr·d. With
    `decoupled`, θ ← (1 - lr·weight_decay) θ comes first.

    Args:
        group: lr, momentum, nesterov, weight_decay, decoupled.
        parameters: changed in place.
        directions: one per parameter, same shape and dtype; never changed.
        state: per parameter; holds the momentum buffers.
        scales: factor of each direction, 0-dimensional; None for 1.
        good: bool (); where it is False nothing changes. None for True.
    """
    if not parameters:
        return
    parameters, directions = list(parameters), list(directions)
    scales = [None] * len(directions) if scales is None else scales
    if good is not None:
        scaled = [d if scale is None else d * scale for d, scale in zip(directions, scales, strict=True)]
        _update_where(good, group, parameters, scaled, state)
        return
    lr, momentum = group["lr"], group["momentum"]
    if group["decoupled"] and group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    if not momentum:
        _add(parameters, directions, scales, -lr)
        return
    # A factor that waits for an addition costs nothing; Nesterov's form needs the direction in two of them.
    if group["nesterov"]:
        directions = [d if scale is None else d * scale for d, scale in zip(directions, scales, strict=True)]
        scales = [None] * len(directions)
    old: list[Tensor] = []
    kept: list[int] = []
    buffers: list[Tensor] = []
    for index, parameter in enumerate(parameters):
        buffer = state[parameter].get(MOMENTUM)
        if buffer is None:
            buffer = torch.empty_like(parameter).copy_(directions[index])
            scale = scales[index]
            if scale is not None:
                buffer.mul_(scale)
            state[parameter][MOMENTUM] = buffer
        else:
            old.append(buffer)
            kept.append(index)
        buffers.append(buffer)
    if kept:
        torch._foreach_mul_(old, momentum)
        _add(old, [directions[index] for index in kept], [scales[index] for index in kept])
    directions = list(torch._foreach_add(directions, buffers, alpha=momentum)) if group["nesterov"] else buffers
    torch._foreach_add_(parameters, directions, alpha=-lr)


def _add(
    tensors: Sequence[Tensor], others: Sequence[Tensor], scales: Sequence[Tensor | None], alpha: float = 1.0
) -> None:
    """Add alpha·scale·other to each tensor. On an accelerator the scales are not read: the host would wait."""
    scaled: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    plain: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    last: Tensor | None = None
    factor = 1.0
    for tensor, other, scale in zip(tensors, others, scales, strict=True):
        if scale is not last:  # one scale for all the parameters of a group is the rule
            last, factor = scale, float(scale) if scale is not None and reading.at_hand(scale) else 1.0
        if scale is not None and not reading.at_hand(scale):
            scaled[0].append(tensor)
            scaled[1].append(other)
            scaled[2].append(scale)
            continue
        members = plain.setdefault(factor, ([], []))
        members[0].append(tensor)
        members[1].append(other)
    for factor, (some, added) in plain.items():
        torch._foreach_add_(some, added, alpha=alpha * factor)
    if scaled[0]:
        torch._foreach_addcmul_(*scaled, value=alpha)


def _update_where(
    good: Tensor,
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Tensor]],
) -> None:
    """The update where `good` is True, without a look at it: torch's fused SGD, which can be told so on the device.

    It is one pass over parameters, directions and buffers, for all tensors of a device and dtype that lie in memory
    alike; what does not is copied beside them first.
    """
    buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, parameter in enumerate(parameters):
        buckets.setdefault((parameter.dtype, parameter.device), []).append(index)
    lr, momentum = group["lr"], group["momentum"]
    for (_, device), chosen in buckets.items():
        bad = reading.brought(good.logical_not(), device, torch.float32)
        some = [parameters[index] for index in chosen]
        places = [_dense(parameter) for parameter in some]
        moves = [_as_laid_out(directions[index], place) for index, place in zip(chosen, places, strict=True)]
        buffers: list[Tensor] = []
        for parameter, place in zip(some, places, strict=True) if momentum else ():
            held = state[parameter].get(MOMENTUM)
            if held is None or held.stride() != place.stride():
                # m · 0 + d is d: the buffer's first value needs no case of its own.
                held = torch.zeros_like(place) if held is None else torch.empty_like(place).copy_(held)
                state[parameter][MOMENTUM] = held
            buffers.append(held)
        if group["decoupled"] and group["weight_decay"]:
            # θ - lr·η·θ: the parameters as their own gradients.
            _fused_sgd(places, places, [], bad, lr=lr * group["weight_decay"])
        _fused_sgd(places, moves, buffers, bad, lr=lr, momentum=momentum, nesterov=group["nesterov"])
        for parameter, place in zip(some, places, strict=True):
            if place is not parameter:
                parameter.copy_(place)


def _fused_sgd(
    parameters: Sequence[Tensor],
    moves: Sequence[Tensor],
    buffers: Sequence[Tensor],
    bad: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> None:
    torch._fused_sgd_(
        *([_real(tensor) for tensor in tensors] for tensors in (parameters, moves, buffers)),
        weight_decay=0.0,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
        found_inf=bad,
    )


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it has gaps or overlaps in memory."""
    if tensor.is_contiguous() or torch.empty_like(tensor).stride() == tensor.stride():
        return tensor
    return tensor.contiguous()


def _as_laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or a copy with the strides of `like`."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
