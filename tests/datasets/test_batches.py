from __future__ import annotations

import pytest
import torch

from kronfac.datasets import Batches, Split


def split(count: int) -> Split:
    return Split(torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1), torch.arange(count))


def order(batches: Batches) -> list[int]:
    return torch.cat([targets for _, targets in batches]).tolist()


def test_every_example_once_and_inputs_follow_targets() -> None:
    batches = Batches(split(23), 5, seed=3)
    assert len(batches) == 5
    seen = list(batches)
    assert [len(targets) for _, targets in seen] == [5, 5, 5, 5, 3]
    assert sorted(order(batches)) == list(range(23))
    assert all(torch.equal(inputs.view(-1), targets.float()) for inputs, targets in seen)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, second = Batches(split(50), 8, seed=3), Batches(split(50), 11, seed=3)
    orders = []
    for epoch in range(3):
        first.set_epoch(epoch)
        torch.rand(epoch + 1)  # the global stream has no say
        orders.append(order(first))
    assert len(set(map(tuple, orders))) == 3
    second.set_epoch(2)
    assert order(second) == orders[2]
    other = Batches(split(50), 8, seed=4)
    other.set_epoch(2)
    assert order(other) != orders[2]


def test_global_stream_is_untouched() -> None:
    before = torch.get_rng_state()
    order(Batches(split(20), 4, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_seed_in_order() -> None:
    assert order(Batches(split(10), 3)) == list(range(10))


def test_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(split(3), 0)
