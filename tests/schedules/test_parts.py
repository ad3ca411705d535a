"""Each example once per epoch, in steps of the right size, whose parts are weighted by what they hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kronfac.datasets import Batches, Split
from kronfac.schedules import FixedBatch, GrowBatch
from tests.schedules.runs import adaptive, digits, mlp, sgd

sizes = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 25)).map(
    lambda found: (found[0], min(found[1], found[0]), found[2])
)


@given(sizes=sizes, seed=st.integers(0, 2**40))
def test_every_example_once_and_weights_sum_to_one(sizes: tuple[int, int, int], seed: int) -> None:
    examples, batch_size, small_batch = sizes
    schedule = FixedBatch(sgd(), examples=examples, batch_size=batch_size, small_batch=small_batch, epochs=2, seed=seed)
    orders = []
    for _ in range(2):
        seen: list[int] = []
        steps = list(schedule.steps())
        assert len(steps) == schedule.steps_per_epoch == math.ceil(examples / batch_size)
        for number, step in enumerate(steps):
            parts = list(step.parts)
            full = batch_size if number < len(steps) - 1 else examples - batch_size * (len(steps) - 1)
            assert step.number == number
            assert step.examples == full == sum(len(part.indices) for part in parts)
            assert [len(part.indices) for part in parts[:-1]] == [small_batch] * (math.ceil(full / small_batch) - 1)
            assert math.fsum(part.weight for part in parts) == pytest.approx(1.0, abs=1e-12)
            assert all(part.weight == len(part.indices) / full and part.adversarial == 0 for part in parts)
            for part in parts:
                assert part.indices.dtype == torch.int64
                seen += part.indices.tolist()
        assert sorted(seen) == list(range(examples))
        orders.append(seen)
        schedule.end_epoch()
    assert examples < 10 or orders[0] != orders[1]


@given(examples=st.integers(8, 80), first=st.integers(1, 8), small=st.integers(1, 9), omega=st.floats(0.01, 1.0))
def test_growing_batches_leave_out_no_example(examples: int, first: int, small: int, omega: float) -> None:
    schedule = adaptive(
        sgd(),
        [4.0, 2.0, 1.0, 0.5],
        examples=examples,
        batch_size=first,
        max_batch_size=examples,
        small_batch=small,
        adversarial=lambda model, loss_fn, x, y: x,
        adversarial_share=omega,
        epochs=20,
        duration=2,
    )
    for _ in range(4):
        seen = []
        for step in schedule.steps():
            for part in step.parts:
                seen.append(part.indices)
                size = len(part.indices)
                share = schedule.omega * size
                assert part.adversarial == (math.floor(share + 1e-7) if share > 1 + 1e-7 else 0) or (
                    abs(share - round(share)) < 1e-6
                )
                assert 0 <= part.adversarial <= size
        assert sorted(torch.cat(seen).tolist()) == list(range(examples))
        schedule.end_epoch()


def test_no_part_crosses_an_epoch() -> None:
    # 10 examples in steps of 8 accumulated from 4: an accumulation carried over would give 3 parts to a later step.
    schedule = FixedBatch(sgd(), examples=10, batch_size=8, small_batch=4, epochs=3)
    for _ in range(3):
        counts = [[len(part.indices) for part in step.parts] for step in schedule.steps()]
        assert counts == [[4, 4], [2]]
        schedule.end_epoch()


def test_the_gradient_of_a_short_step_is_the_mean_over_its_examples() -> None:
    model, (x, y) = mlp().double().eval(), digits(50)
    x = x.double()
    schedule = FixedBatch(
        torch.optim.SGD(model.parameters(), lr=0.1), examples=50, batch_size=32, small_batch=12, epochs=1
    )
    for step in schedule.steps():
        parts = list(step.parts)
        model.zero_grad()
        for part in parts:
            (part.weight * functional.cross_entropy(model(x[part.indices]), y[part.indices])).backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        chosen = torch.cat([part.indices for part in parts])
        functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        for one, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-12, atol=1e-14)
    assert [part.weight for part in parts] == [12 / 18, 6 / 18]


def test_the_order_is_that_of_batches_of_the_same_seed() -> None:
    schedule = FixedBatch(sgd(), examples=23, batch_size=5, epochs=3, seed=7)
    batches = Batches(Split(torch.zeros(23, 1, 1, 1), torch.arange(23)), 5, seed=7)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for step, (_, targets) in zip(schedule.steps(), batches, strict=True):
            (part,) = step.parts
            assert torch.equal(part.indices, targets)
        schedule.end_epoch()


def test_the_order_does_not_touch_the_global_stream() -> None:
    before = torch.get_rng_state()
    schedule = FixedBatch(sgd(), examples=9, batch_size=2, epochs=1)
    loader = DataLoader(TensorDataset(torch.arange(9)), batch_sampler=schedule.batch_sampler)
    assert len(list(schedule.steps(loader=None))) == 5
    schedule = FixedBatch(sgd(), examples=9, batch_size=2, epochs=1)
    loader = DataLoader(TensorDataset(torch.arange(9)), batch_sampler=schedule.batch_sampler)
    for step in schedule.steps(loader):
        list(step.parts)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_the_same_parts(workers: int) -> None:
    data = TensorDataset(torch.arange(50))
    schedules = [
        GrowBatch(
            sgd(), examples=50, batch_size=6, max_batch_size=18, small_batch=4, epochs=3, decay_epochs=(1, 2), decay=0.5
        )
        for _ in range(2)
    ]
    plain, loaded = schedules
    loader = DataLoader(data, batch_sampler=loaded.batch_sampler, num_workers=workers, persistent_workers=workers > 0)
    while not plain.finished:
        assert len(loader) == sum(
            math.ceil(min(plain.batch_size, 50 - at) / 4) for at in range(0, 50, plain.batch_size)
        )
        steps = list(plain.steps())
        read = 0
        for step in loaded.steps(loader):
            for part, expected in zip(step.parts, steps[read].parts, strict=True):
                assert torch.equal(part.batch[0], part.indices)
                assert torch.equal(part.indices, expected.indices)
                assert part.weight == expected.weight
            read += 1
            if read == 2:
                break  # go on with a loader that is begun in the middle of the epoch
        assert len(loader) == sum(len(list(step.parts)) for step in steps[2:])
        for step in loaded.steps(loader):
            assert [part.batch[0].tolist() for part in step.parts] == [
                part.indices.tolist() for part in steps[read].parts
            ]
            read += 1
        assert read == len(steps)
        plain.end_epoch()
        loaded.end_epoch()
