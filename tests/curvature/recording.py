"""What the tests of the recorder share."""

from __future__ import annotations

from typing import Any

from torch import nn

from kronfac.curvature import KroneckerFactors, Recorder, find_layers
from tests.curvature.models import relative


def watch(model: nn.Module, **options: Any) -> Recorder:
    options.setdefault("fisher", "exact")
    return Recorder(model, find_layers(model), **options)


def same(one: dict[str, KroneckerFactors], other: dict[str, KroneckerFactors], tolerance: float = 1e-12) -> bool:
    return one.keys() == other.keys() and all(
        relative(a, b) <= tolerance for layer in one for a, b in zip(one[layer], other[layer], strict=True)
    )
