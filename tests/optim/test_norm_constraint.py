"""The bound on the Euclidean norm of the whole preconditioned direction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC
from kronfac.optim.update import norm_scales
from tests.optim.models import mlp, snapshot, train_step, vectors
from tests.optim.test_step import CountReads

LR = 0.5


def move(parameters: list[dict[str, Any]] | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """One step from the same start: the change of each parameter in units of the lr, and the optimizer."""
    torch.manual_seed(3)
    model = mlp(4, 5, 3, dtype=dtype)
    groups = None
    if parameters is not None:
        groups = [{"params": list(model[2 * i].parameters()), **some} for i, some in enumerate(parameters)]
    optimizer = KFAC(model, LR, params=groups, momentum=0.0, fisher="exact", **options)
    before = snapshot(model)
    train_step(model, optimizer, *vectors(16, 4, 3, dtype))
    return [(a - b) / LR for a, b in zip(before, snapshot(model), strict=True)], optimizer


def norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_over_all_layers_is_the_bound_and_the_direction_stays(
    kl_clip: float | None, dtype: torch.dtype
) -> None:
    free, _ = move(dtype=dtype, kl_clip=kl_clip)
    bounded, optimizer = move(dtype=dtype, kl_clip=kl_clip, norm_constraint=norm(free) / 3)
    (scale,) = optimizer.norm_scales
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert float(scale) == pytest.approx(1 / 3, rel=tolerance)
    assert norm(bounded) == pytest.approx(norm(free) / 3, rel=tolerance)
    if dtype != torch.bfloat16:
        for a, b in zip(free, bounded, strict=True):
            torch.testing.assert_close(b, a / 3, rtol=1e-3, atol=1e-6)


def test_a_direction_inside_the_bound_is_left_alone() -> None:
    free, _ = move(kl_clip=None)
    bounded, optimizer = move(kl_clip=None, norm_constraint=norm(free) * 1.01)
    assert float(optimizer.norm_scales[0]) == 1
    assert all(torch.equal(a, b) for a, b in zip(free, bounded, strict=True))


def test_the_learning_rate_is_not_in_it() -> None:
    """Unlike under the KL clip, the step still grows with lr while the bound is active."""
    direction, _ = move(kl_clip=None, norm_constraint=0.01)
    assert norm(direction) == pytest.approx(0.01)


def test_groups_share_the_sum_and_may_stay_out_of_it() -> None:
    free, _ = move([{}, {}], kl_clip=None)
    whole = norm(free)
    both, optimizer = move([{"norm_constraint": whole / 2}, {"norm_constraint": whole / 4}], kl_clip=None)
    assert [float(scale) for scale in optimizer.norm_scales] == pytest.approx([0.5, 0.25])
    torch.testing.assert_close(both[3], free[3] / 4)
    one, optimizer = move([{"norm_constraint": 1e-3}, {}], kl_clip=None)
    assert optimizer.norm_scales[1] is None
    assert norm(one[:2]) == pytest.approx(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(one[2:], free[2:], strict=True))


def test_scales_of_several_sets() -> None:
    scales = norm_scales([torch.tensor(9.0), torch.tensor(1e9), torch.tensor(16.0)], [1.0, None, 10.0])
    assert [None if scale is None else float(scale) for scale in scales] == [pytest.approx(0.2), None, 1.0]
    assert norm_scales([torch.tensor(0.0)], [1.0]) == [torch.tensor(1.0)]
    assert norm_scales([], []) == []


def test_it_costs_no_wait_for_the_device() -> None:
    model = mlp(4, 5, 5, 5, 3)
    optimizer = KFAC(model, 0.1, norm_constraint=1e-3, inverse_every=100)
    x, y = vectors(8, 4, 3)
    train_step(model, optimizer, x, y)
    functional.cross_entropy(model(x), y).backward()
    with CountReads() as counter:
        optimizer.step()
    assert counter.reads == 0


def test_weight_and_bias_of_a_layer_must_agree() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="norm_constraint: expected the same value"):
        KFAC(model, 0.1, params=[{"params": [model.weight], "norm_constraint": 1.0}, {"params": [model.bias]}])
