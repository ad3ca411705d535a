"""The GPU's kernels of covariance, run on the CPU, against the naive reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronfac.ops import naive
from tests.cuda import emulated_covariance as emulated
from tests.ops.cases import DTYPES, arrange, covariance_error, poisoned

CASES = [(9, 130, 1), (40, 64, 1), (3, 1, 1), (0, 5, 1), (4, 0, 1), (1100, 12, 4), (700, 129, 2)]
HALVES = (torch.bfloat16, torch.float16)


def rounded_to_tf32(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def reference(x: Tensor, bias: bool, scale: float, *, tf32: bool) -> Tensor:
    """In float64; products of float32 with factors rounded to TF32, column sums without."""
    expected = naive.covariance(x.double(), bias, scale)
    if tf32:
        d = x.shape[1]
        expected[:d, :d] = naive.covariance(rounded_to_tf32(x.contiguous()).double(), False, scale)
    return expected


@pytest.mark.parametrize(("m", "d", "least_parts"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_reference(m: int, d: int, least_parts: int, dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(m, d, dtype=dtype)
    out = poisoned((d + bias, d + bias), dtype)
    assert emulated.covariance_(out, x, bias, 0.0, 0.5).parts >= least_parts
    assert torch.equal(out, out.T)
    expected = naive.covariance(x.double(), bias, 0.5)
    assert covariance_error(out, expected) <= (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded_first"])
@pytest.mark.parametrize("m", [50, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_and_the_old_value(m: int, layout: str, dtype: torch.dtype) -> None:
    x = arrange(torch.randn(m, 40).to(dtype), layout)
    start = naive.covariance(torch.randn(60, 40), False, 1.0)
    memory = torch.full((80, 80), float("nan"))
    out = memory[::2, ::2]
    out.copy_(start)
    emulated.covariance_(out, x, False, 0.9, 0.5)
    expected = 0.9 * start.double() + naive.covariance(x.double(), False, 0.5)
    assert covariance_error(out, expected) <= 1e-5
    assert memory[1::2].isnan().all()


# Edges of tiles, of steps and of parts; x (m, d) copied 16 bytes at once where d is a multiple of 8.
TENSOR_CORE_CASES = [(9, 136), (95, 128), (40, 264), (33, 131), (3, 1), (0, 5), (4, 0), (1100, 16), (1100, 13)]


@pytest.mark.parametrize(("m", "d"), TENSOR_CORE_CASES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_tensor_cores_equal_the_reference(m: int, d: int, dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(m, d).to(dtype)
    out = poisoned((d + bias, d + bias), torch.float32)
    tiles = emulated.covariance_(out, x, bias, 0.0, 0.5, tensor_cores=True)
    assert tiles.copied == (d > 0 and d % (8 if dtype in HALVES else 4) == 0)
    assert (tiles.parts > 1) == (m == 1100)
    assert torch.equal(out, out.T)
    assert covariance_error(out, reference(x, bias, 0.5, tf32=dtype == torch.float32)) <= 1e-5


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded_first", "expanded_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tensor_cores_take_any_strides(layout: str, dtype: torch.dtype) -> None:
    x = arrange(torch.randn(70, 40).to(dtype), layout)
    out = poisoned((41, 41), torch.float32)
    emulated.covariance_(out, x, True, 0.0, 1.0, tensor_cores=True)
    assert covariance_error(out, reference(x, True, 1.0, tf32=dtype == torch.float32)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_end_where_x_ends(dtype: torch.dtype) -> None:
    memory = torch.full((80, 144), float("nan"), dtype=dtype)
    x = memory[:45, :133]
    x.copy_(torch.randn(45, 133))
    out = poisoned((134, 134), torch.float32)
    assert emulated.covariance_(out, x, True, 0.0, 1.0, tensor_cores=True).copied
    assert covariance_error(out, reference(x, True, 1.0, tf32=dtype == torch.float32)) <= 1e-5


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("m", "features", "row"), [(45, 133, 144), (1, 1, 8), (32, 128, 128), (65, 260, 264)])
def test_copies_read_every_entry_once_and_nothing_else(m: int, features: int, row: int, halves: bool) -> None:
    assert emulated.copies_are_exact(halves=halves, m=m, features=features, row=row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row_and_column(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(37, 136).to(dtype)
    x[20, 130] = value
    out = poisoned((137, 137), torch.float32)
    emulated.covariance_(out, x, True, 0.0, 1.0, tensor_cores=True)
    assert not out[130].isfinite().any()
    others = [i for i in range(137) if i != 130]
    expected = reference(x, True, 1.0, tf32=dtype == torch.float32)
    assert covariance_error(out[others][:, others], expected[others][:, others]) <= 1e-5


def test_parts_suit_the_rows_and_the_number_of_tiles() -> None:
    for features in (1, 128, 129, 500, 1024, 2000, 4096, 20000):
        for m in (0, 1, 511, 512, 4096, 65536, 1 << 24):
            parts = emulated.tensor_core_parts(m, features)
            assert 1 <= parts <= max(1, m // 256)
    assert emulated.tensor_core_parts(65536, 128) > 64  # one tile
    assert emulated.tensor_core_parts(65536, 2048) > 1  # 136 tiles would leave half of the places empty
    assert emulated.tensor_core_parts(1 << 20, 8192) == 1


def test_large_inputs_are_copied_where_their_rows_are_not_aligned() -> None:
    half, single = torch.bfloat16, torch.float32
    for m, d in ((8192, 1024), (8192, 4096)):
        assert not emulated.copies(half, m, d, (d, 1))
        assert not emulated.copies(half, m, d - 1, (d, 1))
        assert emulated.copies(half, m, d, (d + 4, 1))
        assert not emulated.copies(single, m, d, (d + 4, 1))
        assert emulated.copies(half, m, d, (d, 1), offset=2)
        assert emulated.copies(half, m, d, (2 * d, 2))
    assert emulated.copies(half, 8192, 1024, (1, 8192))
    assert not emulated.copies(half, 8192, 4096, (1, 8192))  # cuBLAS reads columns as well
    assert emulated.copies(half, 8192, 4096, (0, 1))  # but not one row many times
    assert not emulated.copies(half, 100, 1024, (1025, 1))
    assert not emulated.copies(half, 1 << 20, 1000, (1001, 1))


# Products by cuBLAS.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("m", "d"), [(200, 48), (203, 45)])
def test_panels_equal_the_reference(m: int, d: int, layout: str, bias: bool, dtype: torch.dtype) -> None:
    x = arrange(torch.randn(m, d, dtype=torch.float64).to(dtype), layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    old = naive.covariance(torch.randn(60, d + bias, dtype=wide), False, 1.0)
    out = old.clone()
    out.masked_fill_(torch.ones_like(out).triu(1).bool(), float("nan"))  # the old value is that of the lower triangle
    parts = emulated.covariance_by_products_(out, x, bias, 0.9, 0.5, width=16, slots=12)
    # Panels of 2 x 2, 2 x 4 and 2 x 6 tiles, 12 at a time: the last needs no parts, and goes into out if it can.
    assert parts == [3, 3, 0 if (d + bias) * out.element_size() % 16 == 0 else 1]
    assert torch.equal(out, out.T)
    expected = 0.9 * old.double() + naive.covariance(x.double(), bias, 0.5)
    assert covariance_error(out, expected) <= (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("slots", [1, 1000])
@pytest.mark.parametrize("strided", [False, True])
def test_panels_in_out_and_beside_it(slots: int, strided: bool) -> None:
    x = torch.randn(300, 40)
    out = poisoned((40, 40), torch.float32, "strided" if strided else "contiguous")
    parts = emulated.covariance_by_products_(out, x, False, 0.0, 2.0, width=16, slots=slots)
    assert all(part > 1 for part in parts) if slots > 1 else set(parts) == {1 if strided else 0}
    assert torch.equal(out, out.T)
    assert covariance_error(out, naive.covariance(x.double(), False, 2.0)) <= 1e-5


def test_a_scale_of_zero_hides_nothing() -> None:
    x = torch.ones(64, 32)
    x[3, 5] = float("inf")
    out = torch.zeros(32, 32)
    assert 0 not in emulated.covariance_by_products_(out, x, False, 0.0, 0.0, width=16, slots=1)
    assert out[5].isnan().all()
    assert (out[:5, :5] == 0).all()


def test_a_wide_covariance_takes_little_more_than_half_of_the_operations() -> None:
    m, d = 65536, 4096
    plan = emulated.plan(m, d)
    assert plan.chosen
    assert plan.parts == [4, 2, 4, 0]
    assert plan.operations == 2.0 * m * d * d * 10 / 16
    rounds = [-(-8 * 4 * (i + 1) * max(parts, 1) // 132) / max(parts, 1) for i, parts in enumerate(plan.parts)]
    assert sum(rounds) == 2.5


def test_which_shapes_are_cut_into_panels() -> None:
    assert not emulated.plan(65536, 2047).chosen
    assert not emulated.plan(4095, 4096).chosen
    assert emulated.plan(4096, 2048, bias=True).chosen
    for features in (2048, 5000, 16384, 122_880, 122_884, 300_000):
        for bias in (False, True):
            plan = emulated.plan(65536, features, bias=bias)
            assert (len(plan.parts) - 1) * plan.width < features <= len(plan.parts) * plan.width
            assert plan.width == 1024 or features > 122_880
            if not bias:
                assert plan.entries <= 1 << 26
