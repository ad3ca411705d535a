"""Fixtures of the curvature tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kronfac.curvature import KroneckerFactors
from tests.curvature.models import mlp
from tests.curvature.recording import watch


@pytest.fixture
def model() -> nn.Sequential:
    return mlp().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5, dtype=torch.float64)


@pytest.fixture
def expected(model: nn.Module, x: Tensor) -> dict[str, KroneckerFactors]:
    recorder = watch(model)
    model(x)
    result = recorder.collect().factors()
    recorder.remove()
    return result
