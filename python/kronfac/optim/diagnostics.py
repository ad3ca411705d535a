"""What K-FAC is doing, as plain numbers: damping, condition, age of inverses, counts, time per phase."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronfac.curvature.clock import Clock
from kronfac.linalg.damped import pi_from_means
from kronfac.optim.adaptive import Adaptation
from kronfac.optim.background import Background
from kronfac.optim.groups import Groups
from kronfac.optim.layers import Layer
from kronfac.optim.memory import held
from kronfac.optim.structures import Averages, Factorisation
from kronfac.optim.structures.diagonal import DIAGONAL
from kronfac.optim.structures.ekfac import SECOND_MOMENT

_ITERATIONS = 20  # of the power method; the estimate is then within a few per cent, from below


def diagnose(
    *,
    layers: Sequence[Layer],
    groups: Groups,
    state: Mapping[Tensor, Mapping[str, Any]],
    counters: Mapping[str, int],
    clip_scales: Sequence[Tensor | None],
    background: Background | None,
    clock: Clock | None,
    adaptation: Adaptation | None,
) -> dict[str, Any]:
    """See `kronfac.KFAC.diagnostics`. Waits for the device.

    Args:
        layers: the covered layers.
        groups: the param groups.
        state: of the optimizer, by parameter.
        counters: of the optimizer.
        clip_scales: the KL clip's factors of the last step.
        background: that makes inverses, if any.
        clock: that measures phases, if any.
        adaptation: what the adaptive mode adapts and measures, if it is on.
    """
    last = counters["step"] - 1
    memory = held(layers, state, background)
    pending = () if background is None else background.pending
    return {
        **counters,
        "groups": [
            {
                **{name: group[name] for name in ("lr", "momentum", "damping", "weight_decay", "kl_clip")},
                "clip_scale": None if scale is None else float(scale),
            }
            for group, scale in zip(groups, clip_scales, strict=True)
        ],
        "max_staleness": 0 if background is None else background.max_staleness,
        "pending": list(pending),
        "layers": {
            layer.name: {
                "damping": layer.damping(groups),
                **_numbers(layer, layer.damping(groups)),
                "updates": layer.updates,
                "inverse_age": None if layer.made is None else last - layer.made,
                "bytes": memory.layers[layer.name].total,
            }
            for layer in layers
        },
        "bytes": memory.total,
        "seconds": None if clock is None else clock.seconds,
        "adaptation": None if adaptation is None else dataclasses.asdict(adaptation),
        "rho": None if adaptation is None else adaptation.rho,
    }


def flatten(diagnostics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested diagnostics under joined names, ``layers/0/pi``; lists by position, None left out."""
    result: dict[str, float] = {}
    for key, value in diagnostics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{name}/"))
        elif isinstance(value, (list, tuple)):
            if key != "pending":
                result.update(flatten({str(index): item for index, item in enumerate(value)}, f"{name}/"))
        elif isinstance(value, (bool, int, float)):
            result[name] = float(value)
    return result


def _numbers(layer: Layer, damping: float) -> dict[str, float | None]:
    if layer.factors is None:
        return {"pi": None, "condition": None}
    pi = _pi(layer.factors) if layer.block in ("kronecker", "diagonal_input") else None
    condition = None if layer.factorisation is None else _condition(layer, layer.factors, layer.factorisation, damping)
    return {
        "pi": None if pi is None else float(pi.log().mean().exp()),  # of groups the geometric mean
        "condition": None if condition is None else float(condition.max()),
    }


def _pi(factors: Averages) -> Tensor:
    """π of each group, shape () without groups."""
    A = factors.A.mean() if factors.A.dim() == 1 else _mean_diagonal(factors.A)
    return pi_from_means(A, _mean_diagonal(factors.G))


def _mean_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


def _condition(layer: Layer, factors: Averages, f: Factorisation, damping: float) -> Tensor | None:
    """Of the damped block, per group; None for a factorisation of another form than those known here."""
    if layer.block == "pairs":
        values = next((factors.extra[name] for name in (SECOND_MOMENT, DIAGONAL) if name in factors.extra), None)
        return None if values is None else _spread(values.flatten(-2), damping)
    keys = set(f)
    if keys == {"left", "right"}:
        pi, root = _pi(factors), math.sqrt(damping)
        left = _norm(_shifted(factors.G, root / pi)) * _norm(f["left"])
        if layer.block == "diagonal_input":
            return left * (factors.A + pi * root).max() * f["right"].max()
        return left * _norm(_shifted(factors.A, pi * root)) * _norm(f["right"])
    if keys == {"left_vectors", "right_vectors", "eigenvalues"}:
        return _spread(f["eigenvalues"].flatten(-2), damping)
    if keys == {"left_vectors", "left_values", "diagonal"}:
        values, diagonal = f["left_values"], f["diagonal"]
        return (values.max() * diagonal.max() + damping) / (values.min() * diagonal.min() + damping)
    if keys == {"inverse"}:
        return _norm(_shifted(factors.G, torch.as_tensor(damping))) * _norm(f["inverse"])
    if keys == {"vectors", "values"}:
        return _spread(f["values"], damping)
    return None


def _spread(values: Tensor, damping: float) -> Tensor:
    return (values.amax(-1) + damping) / (values.amin(-1) + damping)


def _shifted(factor: Tensor, shift: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + shift.to(factor)[..., None, None] * eye


def _norm(matrix: Tensor) -> Tensor:
    """Largest eigenvalue of each symmetric positive matrix (..., n, n), by the power method: from below."""
    n = matrix.shape[-1]
    # Fixed, so that a look at the diagnostics draws from no random stream, and without symmetry.
    start = 1.5 + torch.arange(n, dtype=torch.float64).cos()
    vector = start.to(matrix).expand(*matrix.shape[:-1]).unsqueeze(-1)
    value = matrix.new_zeros(matrix.shape[:-2])
    for _ in range(_ITERATIONS):
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vector = matrix @ vector
        value = torch.linalg.vector_norm(vector, dim=(-2, -1))
    return value
