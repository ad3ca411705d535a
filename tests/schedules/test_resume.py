"""A run that is saved at any step, also in the middle of an epoch with a grown batch, continues bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac.schedules import AdaptiveBatch, BatchSchedule, FixedBatch, GrowBatch, LinearScaling, top_eigenvalue
from tests.optim.models import equal, same_tree, snapshot
from tests.schedules.runs import adaptive, digits, mlp, saved, sgd, train

DATA = digits(200)
Run = tuple[nn.Module, torch.optim.Optimizer, BatchSchedule]


def fgsm(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(model(x), y), [x])
    return x + 0.02 * gradient.sign()


def start(kind: str) -> Run:
    """ABSA with dropout, momentum, decay and computed eigenvalues."""
    torch.manual_seed(3)
    model = mlp()
    if kind == "kfac":
        optimizer: torch.optim.Optimizer = kronfac.KFAC(model, lr=0.02, kl_clip=None, damping=0.1, inverse_every=3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = AdaptiveBatch(
        optimizer,
        examples=200,
        batch_size=16,
        max_batch_size=100,
        small_batch=16,
        epochs=5,
        decay_epochs=(3,),
        eigenvalue=top_eigenvalue(model, functional.cross_entropy, DATA, examples=60, products=8),
        adversarial=fgsm,
        duration=2,
    )
    return model, optimizer, schedule


@cache
def whole(kind: str) -> tuple[list[Tensor], BatchSchedule]:
    model, optimizer, schedule = start(kind)
    train(schedule, optimizer, model, DATA)
    return snapshot(model), schedule


def continued(kind: str, stop: int, schedule_first: bool) -> Run:
    model, optimizer, schedule = start(kind)
    train(schedule, optimizer, model, DATA, stop=stop)
    state = saved([model.state_dict(), optimizer.state_dict(), schedule.state_dict(), torch.get_rng_state()])
    model, optimizer, schedule = start(kind)
    torch.rand(7)
    model.load_state_dict(state[0])
    pairs = [(optimizer, state[1]), (schedule, state[2])]
    for one, value in reversed(pairs) if schedule_first else pairs:
        one.load_state_dict(value)
    torch.set_rng_state(state[3])
    train(schedule, optimizer, model, DATA)
    return model, optimizer, schedule


@pytest.mark.parametrize("kind", ["sgd", "kfac"])
@settings(max_examples=4)
@given(share=st.floats(0.0, 1.0), schedule_first=st.booleans())
def test_training_continues_bit_for_bit(kind: str, share: float, schedule_first: bool) -> None:
    end, expected = whole(kind)
    grown = next(row["updates"] for row in expected.log if row["next_batch_size"] > 16)
    stop = grown + round(share * (expected.updates - grown))  # in grown batches, at their ends, after the last step
    model, _, schedule = continued(kind, stop, schedule_first)
    assert schedule.log == expected.log
    assert equal(snapshot(model), end)
    assert same_tree(schedule.state_dict(), expected.state_dict())


def test_training_continues_from_the_first_epoch() -> None:
    end, expected = whole("sgd")
    model, _, schedule = continued("sgd", 3, False)
    assert equal(snapshot(model), end)
    assert schedule.log == expected.log


MADE: dict[str, Callable[[torch.optim.Optimizer], BatchSchedule]] = {
    "FixedBatch": lambda optimizer: FixedBatch(optimizer, examples=40, batch_size=9, epochs=3, decay_epochs=(1,)),
    "LinearScaling": lambda optimizer: LinearScaling(
        optimizer, examples=40, batch_size=9, base_batch_size=2, epochs=4, warmup_epochs=2.5, decay_epochs=(1,)
    ),
    "GrowBatch": lambda optimizer: GrowBatch(
        optimizer, examples=40, batch_size=3, max_batch_size=21, epochs=4, decay_epochs=(1, 2)
    ),
    "AdaptiveBatch": lambda optimizer: adaptive(
        optimizer, [4.0] * 3, examples=40, batch_size=3, max_batch_size=21, epochs=6, duration=1
    ),
}


def trace(schedule: BatchSchedule, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Examples and rates of all steps that are left."""
    found: list[Any] = []
    while not schedule.finished:
        for step in schedule.steps():
            lrs = [group["lr"] for group in optimizer.param_groups]
            found.append([part.indices.tolist() for part in step.parts] + lrs)
        schedule.end_epoch()
    return found


@pytest.mark.parametrize("kind", list(MADE))
def test_all_that_is_left_follows_from_the_state(kind: str) -> None:
    optimizer = sgd(0.3, 0.1)
    expected = trace(MADE[kind](optimizer), optimizer)
    optimizer = sgd(0.3, 0.1)
    schedule, taken = MADE[kind](optimizer), 0
    while not schedule.finished:
        for _ in schedule.steps():
            taken += 1
            state, rates = saved(schedule.state_dict()), saved(optimizer.state_dict())
            other = sgd(7.0, 7.0)  # the base rates are those of the checkpoint
            resumed = MADE[kind](other)
            resumed.load_state_dict(state)
            other.load_state_dict(rates)
            assert same_tree(resumed.state_dict(), state)
            assert trace(resumed, other)[:4] == expected[taken : taken + 4]
        schedule.end_epoch()
        other = sgd(7.0, 7.0)
        resumed = MADE[kind](other)
        resumed.load_state_dict(saved(schedule.state_dict()))
        assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
        assert resumed.log == schedule.log


def test_a_run_can_be_extended() -> None:
    first, second = sgd(1.0), sgd(1.0)
    short = FixedBatch(first, examples=6, batch_size=2, epochs=1)
    trace(short, first)
    longer = FixedBatch(second, examples=6, batch_size=2, epochs=3)
    longer.load_state_dict(short.state_dict())
    assert len(trace(longer, second)) == 6
    assert longer.updates == 9


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dict": (lambda state: [], "state_dict: expected a dict"),
    "missing": (lambda state: state.pop("log"), "'log' is missing"),
    "format": (lambda state: state.update(format=99), "format: expected 1, got 99"),
    "other": (lambda state: state.update(schedule="FixedBatch"), "expected 'AdaptiveBatch', got 'FixedBatch'"),
    "option": (lambda state: state["options"].update(growth=3), "options.growth: expected 2, got 3"),
    "seed": (lambda state: state["options"].update(seed=1), "options.seed: expected 0, got 1"),
    "epoch": (lambda state: state.update(epoch=99), "epoch: expected an integer from 0 to 6"),
    "position": (lambda state: state.update(position=5), "position: expected a multiple"),
    "batch": (lambda state: state.update(batch_size=2), "batch_size: expected an integer from 3 to 21"),
    "groups": (lambda state: state["lrs"].pop(), "lrs: expected a list of 1 learning rates"),
    "rate": (lambda state: state["base_lrs"].__setitem__(0, float("nan")), r"base_lrs\[0\]: expected a finite"),
    "row": (lambda state: state["log"][0].update(lr=[1]), r"log\[0\]: expected plain"),
    "log": (lambda state: state["log"].pop(), "log: expected a list of 2 rows"),
    "omega": (lambda state: state["own"].update(omega=0.5), "own.omega: expected a finite number from 0 to 0"),
    "reference": (lambda state: state["own"].update(reference=float("inf")), "own.reference: expected a finite"),
    "timer": (lambda state: state["own"].update(timer=-1), "own.timer: expected an integer from 0"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_checkpoint_that_does_not_fit_changes_nothing(what: str) -> None:
    damage, message = BROKEN[what]
    schedule = MADE["AdaptiveBatch"](sgd(0.3))
    for _ in range(2):
        for _ in schedule.steps():
            pass
        schedule.end_epoch()
    next(schedule.steps())
    state = copy.deepcopy(schedule.state_dict())
    damaged = damage(state)
    optimizer = sgd(0.3)
    fresh = MADE["AdaptiveBatch"](optimizer)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(damaged if what == "no dict" else state)
    assert same_tree(fresh.state_dict(), before)
    assert optimizer.param_groups[0]["lr"] == 0.3
