"""Batch sizes and learning rates of each schedule against closed forms written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronfac.schedules import FixedBatch, GrowBatch, LinearScaling
from tests.schedules.runs import adaptive, column, sgd, walk


def rates(schedule: LinearScaling, optimizer: torch.optim.Optimizer) -> list[float]:
    """The rate at each step of the run."""
    found = []
    while not schedule.finished:
        for _ in schedule.steps():
            found.append(optimizer.param_groups[0]["lr"])
        schedule.end_epoch()
    return found


def test_baseline() -> None:
    optimizer = sgd(0.1, 0.02)
    schedule = FixedBatch(optimizer, examples=100, batch_size=30, epochs=5, decay_epochs=(2, 4), decay=0.2)
    seen = []
    while not schedule.finished:
        for _ in schedule.steps():
            seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        schedule.end_epoch()
    factors = [1.0] * 8 + [0.2] * 8 + [0.04] * 4
    assert seen == [pytest.approx((0.1 * factor, 0.02 * factor), rel=1e-14) for factor in factors]
    assert column(schedule, "batch_size") == [30] * 5
    assert column(schedule, "updates") == [4, 8, 12, 16, 20]
    assert column(schedule, "lr_scale") == [1.0, 1.0, 0.2, 0.2, 0.04]
    assert column(schedule, "next_lr")[:4] == pytest.approx([0.1, 0.02, 0.02, 0.004], rel=1e-14)
    assert column(schedule, "reason") == ["unchanged", "decay", "unchanged", "decay", "end"]


def test_linear_scaling_with_warm_up() -> None:
    optimizer = sgd(0.1)
    schedule = LinearScaling(
        optimizer,
        examples=100,
        batch_size=40,
        base_batch_size=10,
        epochs=5,
        warmup_epochs=2,
        decay_epochs=(3,),
        decay=0.5,
    )
    # 3 steps an epoch: 6 of warm-up from 0.1 to 0.4 by 0.05 each
    expected = [0.1 + 0.05 * step for step in range(6)] + [0.4] * 3 + [0.2] * 6
    assert rates(schedule, optimizer) == pytest.approx(expected, rel=1e-14)
    assert column(schedule, "reason") == ["warm-up", "unchanged", "decay", "unchanged", "end"]


def test_warm_up_of_a_fraction_and_none() -> None:
    optimizer = sgd(1.0)
    schedule = LinearScaling(optimizer, examples=8, batch_size=2, base_batch_size=1, epochs=2, warmup_epochs=0.5)
    assert rates(schedule, optimizer) == [1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    optimizer = sgd(1.0)
    LinearScaling(optimizer, examples=8, batch_size=2, base_batch_size=8, epochs=2, warmup_epochs=0)
    assert optimizer.param_groups[0]["lr"] == 0.25  # at once, also downwards


def test_grow_batch_keeps_the_rate_to_the_last_bit() -> None:
    optimizer = sgd(0.1)
    schedule = GrowBatch(
        optimizer, examples=20000, batch_size=128, max_batch_size=16000, epochs=5, decay_epochs=(1, 2, 3, 4), decay=0.2
    )
    walk(schedule)
    # 128 · 5 = 640, · 5 = 3200, · 5 = 16000, then the rate
    assert column(schedule, "batch_size") == [128, 640, 3200, 16000, 16000]
    assert column(schedule, "lr") == [0.1, 0.1, 0.1, 0.1, pytest.approx(0.02, rel=1e-14)]
    assert column(schedule, "reason") == ["growth", "growth", "growth", "decay", "end"]


def test_grow_batch_splits_a_factor_that_does_not_fit() -> None:
    schedule = GrowBatch(
        sgd(0.1), examples=1000, batch_size=10, max_batch_size=80, epochs=4, decay_epochs=(1, 2, 3), decay=0.2
    )
    walk(schedule)
    # 10 -> 50 -> 250, of which 80 fit: the rate takes 80/250
    assert column(schedule, "batch_size") == [10, 50, 80, 80]
    assert column(schedule, "lr") == pytest.approx([0.1, 0.1, 0.032, 0.0064], rel=1e-14)
    ratios = [row["lr"] / row["batch_size"] for row in schedule.log]
    assert ratios == pytest.approx([0.01 * 0.2**k for k in range(4)], rel=1e-14)
    assert column(schedule, "reason") == ["growth", "growth, decay", "decay", "end"]


def test_grow_batch_by_no_integer() -> None:
    schedule = GrowBatch(
        sgd(1.0), examples=100, batch_size=10, max_batch_size=100, epochs=3, decay_epochs=(1, 2), decay=0.7
    )
    walk(schedule)
    assert column(schedule, "batch_size") == [10, 14, 20]  # 14.28…, 20.4…
    assert column(schedule, "lr") == pytest.approx([1.0, 1.4 * 0.7, 2.0 * 0.49], rel=1e-14)


def test_a_third_is_a_third() -> None:
    schedule = GrowBatch(
        sgd(0.3), examples=90, batch_size=10, max_batch_size=90, epochs=3, decay_epochs=(1, 2), decay=1 / 3
    )
    walk(schedule)
    assert column(schedule, "batch_size") == [10, 30, 90]
    assert column(schedule, "lr") == [0.3, 0.3, 0.3]


def test_adaptive_by_eigenvalue() -> None:
    values = [8.0, 5.0, 4.0, 3.0, 2.0, 0.5]
    schedule = adaptive(sgd(0.1, 0.5), values, epochs=8)
    walk(schedule)
    # the reference is 8, then 4, then 2: grown after epochs 2, 4 and 5, to the largest batch, where nothing is computed
    assert column(schedule, "batch_size") == [4, 4, 4, 8, 8, 16, 32, 32]
    assert column(schedule, "lr") == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.2, 0.4, 0.8, 0.8], rel=1e-14)
    assert column(schedule, "eigenvalue") == [*values, None, None]
    assert column(schedule, "reference") == [8.0, 8.0, 4.0, 4.0, 2.0, 0.5, 0.5, 0.5]
    assert column(schedule, "timer") == [1, 2, 0, 1, 0, 0, 0, 0]
    assert column(schedule, "reason") == [
        "reference", "unchanged", "eigenvalue", "unchanged", "eigenvalue", "eigenvalue", "largest batch", "end"
    ]  # fmt: skip


def test_adaptive_by_duration_takes_a_new_reference() -> None:
    # With the reference left at 8, the 4 after the growth by duration would look like a fall by half.
    schedule = adaptive(sgd(0.1), [8.0, 8.0, 7.0, 4.0, 3.5], duration=3, epochs=6)
    walk(schedule)
    assert column(schedule, "reference") == [8.0, 8.0, 7.0, 7.0, 3.5, 3.5]
    assert column(schedule, "batch_size") == [4, 4, 4, 8, 8, 16]
    assert column(schedule, "reason") == ["reference", "unchanged", "duration", "unchanged", "eigenvalue", "end"]


def test_adaptive_decays_besides() -> None:
    schedule = adaptive(sgd(1.0), [4.0, 2.0, 2.0, 1.0], decay_epochs=(2, 3), decay=0.1)
    walk(schedule)
    assert column(schedule, "batch_size") == [4, 4, 8, 8, 16]
    assert column(schedule, "lr") == pytest.approx([1.0, 1.0, 2 * 0.1, 2 * 0.01, 4 * 0.01], rel=1e-14)
    assert column(schedule, "reason") == ["reference", "eigenvalue, decay", "decay", "eigenvalue", "end"]


def test_the_last_growth_takes_what_fits() -> None:
    schedule = adaptive(sgd(1.0), [4.0, 2.0, 1.0], max_batch_size=11)
    walk(schedule)
    assert column(schedule, "batch_size") == [4, 4, 8, 11]
    assert column(schedule, "lr") == pytest.approx([1.0, 1.0, 2.0, 2.75], rel=1e-14)


def test_every_few_epochs() -> None:
    schedule = adaptive(sgd(1.0), [4.0, 3.0, 2.0, 1.5, 1.0, 0.9], every=2, duration=3, epochs=10)
    walk(schedule)
    # due after epochs 1, 3, 5 and 7; after 2 and 8 computed for the growth by duration
    assert column(schedule, "eigenvalue") == [None, 4.0, 3.0, 2.0, None, 1.5, None, 1.0, 0.9, None]
    assert column(schedule, "reference") == [None, 4.0, 3.0, 3.0, 3.0, 1.5, 1.5, 1.5, 0.9, 0.9]
    assert column(schedule, "timer") == [1, 2, 0, 1, 2, 0, 1, 2, 0, 0]
    assert column(schedule, "batch_size") == [4, 4, 4, 8, 8, 8, 16, 16, 16, 32]


def test_capturable_rates_are_filled_in_place() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))], lr=rate, capturable=True)
    walk(FixedBatch(optimizer, examples=4, batch_size=2, epochs=2, decay_epochs=(1,), decay=0.5))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
