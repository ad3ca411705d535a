"""Autocast, half-precision models, GradScaler."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.models import convnet, equal, frozen_state, images, mlp, same_tree, snapshot, train_step, vectors


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_trains_with_float32_factors(dtype: torch.dtype, solve: str) -> None:
    model = mlp(6, 8, 3, dtype=dtype)
    optimizer = KFAC(model, 0.1, solve=solve)
    x, y = vectors(32, 6, 3, dtype)
    losses = [train_step(model, optimizer, x, y) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.skipped_steps == 0
    for pair in optimizer.factors().values():
        assert pair.A.dtype == pair.G.dtype == torch.float32
    assert all(p.dtype == dtype for p in model.parameters())


def test_the_step_of_a_half_precision_model_is_that_of_its_float32_twin_up_to_rounding() -> None:
    half, full = convnet(torch.bfloat16), convnet()
    full.load_state_dict(half.state_dict())
    x, y = images(16, torch.bfloat16)
    before = snapshot(full)
    one, other = KFAC(half, 0.1, fisher="exact"), KFAC(full, 0.1, fisher="exact")
    train_step(half, one, x, y)
    train_step(full, other, x.float(), y)
    for a, b, start in zip(half.parameters(), full.parameters(), before, strict=True):
        moved, expected = a.detach().float() - start, b.detach() - start
        assert float((moved - expected).norm()) < 0.15 * float(expected.norm()) + 2**-8 * float(start.norm())


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_autocast(fisher: str) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, fisher=fisher)
    x, y = images(16)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(pair.A.dtype == torch.float32 for pair in optimizer.factors().values())


def test_a_step_inside_autocast_is_the_same_step() -> None:
    x, y = vectors(16, 4, 3)
    results = []
    for inside in (False, True):
        torch.manual_seed(3)
        model = mlp(4, 5, 3)
        optimizer = KFAC(model, 0.1, fisher="exact", weight_decay=0.1)
        functional.cross_entropy(model(x), y).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            optimizer.step()
        results.append(snapshot(model))
    assert equal(*results)


def scaled_step(
    model: torch.nn.Module, optimizer: KFAC, scaler: Any, x: torch.Tensor, y: torch.Tensor, unscale: bool
) -> None:
    optimizer.zero_grad()
    scaler.scale(functional.cross_entropy(model(x), y)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_grad_scaler_changes_nothing(fisher: str, unscale: bool) -> None:
    model, twin = mlp(4, 5, 3), mlp(4, 5, 3)
    twin.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scaled = KFAC(model, 0.1, fisher=fisher, seed=0, grad_scaler=scaler)
    plain = KFAC(twin, 0.1, fisher=fisher, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            x, y = vectors(6, 4, 3)
            scaled_step(model, scaled, scaler, x, y, unscale)
            train_step(twin, plain, x, y)
    assert scaler.get_scale() > 1024
    for a, b in zip(snapshot(model), snapshot(twin), strict=True):
        torch.testing.assert_close(a, b)
    for name, pair in plain.factors().items():
        torch.testing.assert_close(pair.G, scaled.factors()[name].G)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_the_scaler_finds_infinite_skips_everything(unscale: bool) -> None:
    model = mlp(4, 5, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = KFAC(model, 0.1, grad_scaler=scaler)
    x, y = vectors(6, 4, 3)
    scaled_step(model, optimizer, scaler, x, y, unscale)
    weights, state = snapshot(model), frozen_state(optimizer)
    state["kronfac"]["counters"]["skipped_steps"] = 1
    optimizer.zero_grad()
    scaler.scale(functional.cross_entropy(model(x), y)).backward()
    generator = optimizer.state_dict()["kronfac"]["generator"]
    model[0].weight.grad[0, 0] = float("inf")
    with warnings.catch_warnings():  # the scaler probes for overflow: nothing to warn of
        warnings.simplefilter("error")
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert optimizer.skipped_steps == 1
    assert equal(weights, snapshot(model))
    state["kronfac"]["generator"] = generator  # the forward did draw
    assert same_tree(state, optimizer.state_dict())
    scaled_step(model, optimizer, scaler, x, y, unscale)
    assert optimizer.state_dict()["kronfac"]["counters"]["step"] == 2


def test_gradients_are_unscaled_in_place_once() -> None:
    model = mlp(4, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(6, 4, 3)
    expected = torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))
    scaled_step(model, optimizer, scaler, x, y, False)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_empirical_statistics_after_unscale_need_the_scaler() -> None:
    model = mlp(4, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = KFAC(model, 0.1, fisher="empirical")
    before = snapshot(model)
    with pytest.raises(ValueError, match="grad_scaler="):
        scaled_step(model, optimizer, scaler, *vectors(6, 4, 3), True)
    assert equal(before, snapshot(model))


def test_a_disabled_scaler_is_no_scaler() -> None:
    model = mlp(4, 3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = KFAC(model, 0.1, fisher="empirical", grad_scaler=scaler)
    before = snapshot(model)
    scaled_step(model, optimizer, scaler, *vectors(6, 4, 3), False)
    assert not equal(before, snapshot(model))
