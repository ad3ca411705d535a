from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.optim.update import add_weight_decay, apply_update, kl_scales


def test_kl_scale_is_the_formula_over_all_sets() -> None:
    dots = [torch.tensor(4.0), torch.tensor(9.0)]
    scales = kl_scales(dots, [0.5, 0.1], [1e-3, 1e-3])
    expected = math.sqrt(1e-3 / (0.25 * 4 + 0.01 * 9))
    assert [float(s) for s in scales if s is not None] == pytest.approx([expected, expected])


def test_sets_without_clip_stay_out_of_the_sum_and_kappa_may_differ() -> None:
    scales = kl_scales([torch.tensor(4.0), torch.tensor(1e9), torch.tensor(5.0)], [1.0, 1.0, 1.0], [0.01, None, 0.04])
    assert scales[1] is None
    assert float(scales[0]) == pytest.approx(math.sqrt(0.01 / 9))  # type: ignore[arg-type]
    assert float(scales[2]) == pytest.approx(math.sqrt(0.04 / 9))  # type: ignore[arg-type]
    assert kl_scales([torch.tensor(1.0)], [0.1], [None]) == [None]
    assert kl_scales([], [], []) == []


@pytest.mark.parametrize(("dot", "lr"), [(1.0, 0.0), (0.0, 1.0), (-1e-12, 1.0), (1e-8, 1e-3)])
def test_a_small_or_vanishing_step_is_not_scaled(dot: float, lr: float) -> None:
    (scale,) = kl_scales([torch.tensor(dot)], [lr], [1e-3])
    assert scale is not None
    assert float(scale) == 1.0


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    lr=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_update_is_torch_sgds(momentum: float, nesterov: bool, decay: float, lr: float, dtype: torch.dtype) -> None:
    nesterov = nesterov and momentum > 0
    ours = [torch.randn(3, 2, dtype=dtype), torch.randn(4, dtype=dtype)]
    theirs = [p.clone().requires_grad_() for p in ours]
    sgd = torch.optim.SGD(theirs, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, foreach=True)
    state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    group = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay, "decoupled": False}
    for step in range(4):
        moving = ours if step != 1 else ours[:1]  # a parameter without gradient keeps its place and its momentum
        grads = [torch.randn_like(p) for p in moving]
        for p in theirs:
            p.grad = None
        for p, g in zip(theirs, grads, strict=False):
            p.grad = g.clone()
        sgd.step()
        apply_update(group, moving, [g.add(p, alpha=decay) for p, g in zip(moving, grads, strict=True)], state)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-6 if decay else 0.0)


def test_decoupled_decay_acts_on_the_weights_alone() -> None:
    weight = torch.tensor([2.0, -4.0])
    state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    group = {"lr": 0.5, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "decoupled": True}
    apply_update(group, [weight], [torch.zeros(2)], state)
    torch.testing.assert_close(weight, torch.tensor([1.9, -3.8]))
    assert float(state[weight]["momentum_buffer"].abs().sum()) == 0


def test_directions_are_left_alone() -> None:
    weight, direction = torch.zeros(2), torch.ones(2)
    state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    group = {"lr": 1.0, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0, "decoupled": False}
    for _ in range(3):
        apply_update(group, [weight], [direction], state)
    assert direction.tolist() == [1.0, 1.0]


def test_weight_decay_per_column_block() -> None:
    gradient, weight = torch.randn(3, 4), torch.randn(3, 4)
    before = gradient.clone()
    torch.testing.assert_close(add_weight_decay(gradient, weight, [0.1, 0.1], [3, 1]), gradient + 0.1 * weight)
    split = add_weight_decay(gradient, weight, [0.1, 0.0], [3, 1])
    torch.testing.assert_close(split[:, :3], (gradient + 0.1 * weight)[:, :3])
    torch.testing.assert_close(split[:, 3], gradient[:, 3])
    assert add_weight_decay(gradient, weight, [0.0, 0.0], [3, 1]) is gradient
    assert torch.equal(gradient, before)
