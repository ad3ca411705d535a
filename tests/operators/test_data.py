from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronfac.operators.data import checksum, leaves, to_device


@given(
    dtype=st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    ),
    size=st.integers(2, 40),
    seed=st.integers(0, 1000),
)
def test_checksum_tells_content_and_order(dtype: torch.dtype, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2 if dtype == torch.bool else 100, (size,), generator=generator).to(dtype)
    assert checksum(values) == checksum(values.clone())
    assert checksum(values) == checksum(torch.stack([values, values], dim=1)[:, 0])
    for changed in (values.roll(1), values.flip(0), torch.where(torch.arange(size) == 0, ~values.bool(), values)):
        changed = changed.to(dtype)
        assert (checksum(changed) == checksum(values)) == torch.equal(changed, values)


def test_checksum_reaches_past_the_first_chunk() -> None:
    values = torch.zeros(2**20 + 5)
    other = values.clone()
    other[-1] = 1e-30
    moved = values.clone()
    moved[-2] = 1e-30
    assert len({checksum(values), checksum(other), checksum(moved)}) == 3
    assert checksum(torch.zeros(0)) == checksum(torch.zeros(0, 3))


def test_leaves_and_devices_of_nested_batches() -> None:
    point = np.arange(2)
    tree = {"a": [torch.ones(1), (2, None)], "b": point}
    assert [type(leaf) for leaf in leaves(tree)] == [str, torch.Tensor, int, type(None), str, np.ndarray]
    moved = to_device(tree, torch.device("cpu"))
    assert list(moved) == ["a", "b"]
    assert moved["a"][1] == (2, None)
    assert moved["b"] is point
    with torch.inference_mode():
        inference = torch.ones(2)
    assert not to_device((inference,), None)[0].is_inference()
