"""Hooks come and go with the optimizer; copies of the model are free of it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.models import equal, mlp, snapshot, train_step, vectors


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_deleting_the_optimizer_removes_its_hooks(fisher: str) -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, fisher=fisher)
    assert hooks(model) > 0
    train_step(model, optimizer, *vectors(5, 3, 2))
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    assert hooks(model) == 0
    functional.cross_entropy(model(torch.randn(5, 3)), torch.zeros(5, dtype=torch.long)).backward()


def test_a_scheduler_keeps_the_optimizer_and_lets_it_go() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    del optimizer
    gc.collect()
    assert hooks(model) > 0
    del scheduler
    gc.collect()
    assert hooks(model) == 0


def test_the_model_may_die_with_the_optimizer() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(5, 3, 2))
    watched = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert watched() is None


def test_copies_of_the_model_are_not_watched() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, fisher="exact")
    x, y = vectors(5, 3, 2)
    train_step(model, optimizer, x, y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    factors = optimizer.factors()["0"].A
    for twin in copies:
        functional.cross_entropy(twin(100 * x), y).backward()
    train_step(model, optimizer, x, y)
    torch.testing.assert_close(optimizer.factors()["0"].A, factors)
    for twin in copies:  # and each can have an optimizer of its own
        own = KFAC(twin, 0.1)
        train_step(twin, own, x, y)
        assert set(own.factors()) == {"0", "2"}


def test_two_optimizers_on_one_model_share_it_by_layers() -> None:
    model = mlp(3, 4, 2, dtype=torch.float64)
    first = KFAC(model, 0.1, params=list(model[0].parameters()), fisher="exact", kl_clip=None, damping=0.1)
    second = KFAC(model, 0.2, params=list(model[2].parameters()), fisher="exact", kl_clip=None, damping=0.3)
    twin = mlp(3, 4, 2, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    groups = [
        {"params": twin[0].parameters(), "lr": 0.1, "damping": 0.1},
        {"params": twin[2].parameters(), "lr": 0.2, "damping": 0.3},
    ]
    both = KFAC(twin, 0.1, params=groups, fisher="exact", kl_clip=None)
    for _ in range(3):
        x, y = vectors(6, 3, 2, torch.float64)
        first.zero_grad()
        second.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
        train_step(twin, both, x, y)
    for a, b in zip(snapshot(model), snapshot(twin), strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_optimizer_on_the_same_parameters_does_not_disturb_the_first() -> None:
    model, twin = mlp(3, 2), mlp(3, 2)
    twin.load_state_dict(model.state_dict())
    one, idle, alone = KFAC(model, 0.1, seed=0), KFAC(model, 0.1, seed=9), KFAC(twin, 0.1, seed=0)
    x, y = vectors(5, 3, 2)
    for _ in range(3):
        train_step(model, one, x, y)
        train_step(twin, alone, x, y)
    assert equal(snapshot(model), snapshot(twin))
    idle.step()


def test_nothing_of_the_graph_outlives_the_step() -> None:
    """The extra backward keeps no graph: what the forward saved is freed with the loss."""
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    hidden: list[weakref.ref[torch.Tensor]] = []
    handle = model[1].register_forward_hook(lambda m, a, out: hidden.append(weakref.ref(out)))
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    del loss
    handle.remove()
    gc.collect()
    assert hidden[0]() is None
