"""Whether all entries are finite, by their sum, against looking at each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronfac.linalg.finite import all_finite

LARGEST = torch.finfo(torch.float32).max
ENTRIES = st.sampled_from([0.0, 1.0, -2.5, LARGEST, -LARGEST, 1e-45, math.inf, -math.inf, math.nan])


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRIES, max_size=12), st.booleans())
def test_every_mixture(entries: list[float], wide: bool) -> None:
    values = torch.tensor(entries, dtype=torch.float64 if wide else torch.float32)
    assert all_finite(values) == all(math.isfinite(entry) for entry in entries)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 31, 99_999])
def test_one_entry_of_many(bad: float, place: int) -> None:
    values = torch.randn(100_000)
    assert all_finite(values)
    values[place] = bad
    assert not all_finite(values)
    assert not all_finite(values.view(100, 1000).mT)


def test_a_sum_that_overflows() -> None:
    values = torch.full((1000,), 0.5 * LARGEST)
    assert not math.isfinite(float(values.sum()))
    assert all_finite(values)
    values[7] = math.nan
    assert not all_finite(values)


def test_other_types() -> None:
    assert all_finite(torch.full((9,), 60_000.0, dtype=torch.float16))
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.empty(0))
    assert not all_finite(torch.tensor([math.nan], dtype=torch.bfloat16))
