"""What stands for the instructions of tensor cores on the CPU, against the layouts of the PTX manual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import emulated_covariance as emulated


def words(entries: Tensor) -> Tensor:
    """Numbers of 16 bits in pairs, the first in the lower half of a word, or floats, as int32."""
    if entries.dtype == torch.float32:
        return entries.view(torch.int32)
    halves = entries.view(torch.int16).to(torch.int64) & 0xFFFF
    whole = halves[..., 0::2] | halves[..., 1::2] << 16
    return (whole - (whole >> 31 << 32)).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    before = torch.randn(16, 8)
    a_of, b_of = torch.empty(32, 8, dtype=dtype), torch.empty(32, 4, dtype=dtype)
    total = torch.empty(32, 4)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = in_group * 2 + (i & 1) if i < 4 else in_group * 2 + (i & 1) + 8
            a_of[lane, i] = a[row, column]
        for i in range(4):
            row = in_group * 2 + (i & 1) if i < 2 else in_group * 2 + (i & 1) + 8
            b_of[lane, i] = b[row, group]
    _check(dtype, a, b, before, words(a_of), words(b_of), total)


def test_products_of_tf32() -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    before = torch.randn(16, 8)
    a_of, b_of = torch.empty(32, 4), torch.empty(32, 2)
    total = torch.empty(32, 4)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(4):
            a_of[lane, i] = a[group if i in (0, 2) else group + 8, in_group if i < 2 else in_group + 4]
        for i in range(2):
            b_of[lane, i] = b[in_group + 4 * i, group]
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b)]
    _check(torch.float32, cut[0], cut[1], before, words(a_of), words(b_of), total)


def _check(dtype: torch.dtype, a: Tensor, b: Tensor, before: Tensor, a_of: Tensor, b_of: Tensor, total: Tensor) -> None:
    def place(lane: int, i: int) -> tuple[int, int]:
        return (lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)

    for lane in range(32):
        for i in range(4):
            total[lane, i] = before[place(lane, i)]
    emulated.multiply_add(dtype, a_of.contiguous(), b_of.contiguous(), total)
    expected = before.double() + a.double() @ b.double()
    for lane in range(32):
        for i in range(4):
            assert abs(total[lane, i].double() - expected[place(lane, i)]) < 1e-5


def test_transposed_loads() -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    fragments = emulated.load_transposed(matrices)
    for lane in range(32):
        for matrix in range(4):
            low, high = (int(matrices[matrix, 2 * (lane % 4) + e, lane // 4]) for e in (0, 1))
            assert int(fragments[lane, matrix]) == low | high << 16


@pytest.mark.parametrize(
    ("x", "bits"),
    [
        (1.0, 0x3F800000),
        (1.0 + 2.0**-11, 0x3F802000),  # a tie, away from zero
        (-1.0 - 2.0**-11, 0xBF802000),
        (1.0 + 2.0**-12, 0x3F800000),
        (2.0 - 2.0**-20, 0x40000000),
        (-0.0, 0x80000000),
        (2.0**-140, 0),
        (float("inf"), 0x7F800000),
        (float("nan"), 0x7FFFFFFF),
    ],
)
def test_rounding_to_tf32(x: float, bits: int) -> None:
    assert emulated.tf32_bits(x) == bits
