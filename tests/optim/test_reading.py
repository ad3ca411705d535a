"""What is read at once on the CPU, and stays a tensor on an accelerator, takes the same steps either way."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC, reading
from kronfac.optim.ranks import agree
from kronfac.optim.refresh import all_finite, is_finite
from tests.optim.models import mlp, train_step, vectors

CPU = torch.device("cpu")


def trained(model: nn.Module, options: dict[str, Any], spoilt: bool) -> tuple[list[Tensor], list[Any]]:
    torch.manual_seed(3)
    two = [
        {"params": list(model[0].parameters()), "lr": 0.2, "weight_decay": 0.1},
        {"params": [*model[2:].parameters()]},
    ]
    optimizer = KFAC(model, 0.1, params=two if options.pop("two_groups", False) else None, seed=0, **options)
    for step in range(5):
        x, y = vectors(8, 4, 3, dtype=torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        if spoilt and step == 2:
            model[2].bias.grad[1] = math.nan
        optimizer.step()
    assert optimizer.skipped_steps == int(spoilt)
    return [p.detach().clone() for p in model.parameters()], [*optimizer.clip_scales, *optimizer.norm_scales]


@pytest.mark.filterwarnings("ignore:KFAC. the gradients of .* not finite")
@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True, "norm_constraint": 1e-3},
        {"kl_clip": None, "norm_constraint": 1e-2},
        {"two_groups": True},
        {"two_groups": True, "norm_constraint": 1e-2, "weight_decay": 0.01},
        {"two_groups": True, "kl_clip": None},
    ],
    ids=str,
)
def test_a_step_is_the_same_whether_values_are_at_hand_or_not(options: dict[str, Any], spoilt: bool) -> None:
    runs = []
    for at_hand in (True, False):
        torch.manual_seed(1)
        with mock.patch.object(reading, "at_hand", return_value=at_hand):
            runs.append(trained(mlp(4, 6, 3, dtype=torch.float64), dict(options), spoilt))
    (ours, scales), (theirs, others) = runs
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert [scale is None for scale in scales] == [scale is None for scale in others]
    for scale, other in zip(scales, others, strict=True):
        if scale is not None:
            torch.testing.assert_close(scale, other, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("size", [3, 300, 5000])
@pytest.mark.parametrize("value", [1e38, math.inf, -math.inf, math.nan])
def test_one_value_decides_over_a_tensor(value: float, size: int, at_hand: bool) -> None:
    tensor = torch.full((size,), -3e38)  # sums and differences of such entries overflow, the entries do not
    tensor[size // 2] = value
    with mock.patch.object(reading, "at_hand", return_value=at_hand):
        assert bool(is_finite(tensor)) == math.isfinite(value)
        assert agree(all_finite([torch.zeros(2), tensor]), CPU) == math.isfinite(value)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("waiting", [True, False])
def test_every_verdict_counts_whether_it_is_known_or_not(known: bool, waiting: bool) -> None:
    assert agree([True, torch.tensor(waiting), known], CPU) == (known and waiting)
    assert agree([known], CPU) == known
    assert agree([torch.tensor(waiting)], CPU) == waiting
    assert agree([], CPU)


def test_an_option_that_somebody_changes_is_checked_at_the_next_step() -> None:
    model = mlp(4, 3)
    optimizer = KFAC(model, 0.1)
    for _ in range(2):
        train_step(model, optimizer, *vectors(8, 4, 3))
    optimizer.param_groups[0]["momentum"] = 1.5
    with pytest.raises(ValueError, match=r"KFAC: params\[0\]: momentum: expected a number >= 0 and < 1, got 1.5"):
        train_step(model, optimizer, *vectors(8, 4, 3))
    optimizer.param_groups[0]["momentum"] = 0.5
    train_step(model, optimizer, *vectors(8, 4, 3))
    assert optimizer.steps == 3
