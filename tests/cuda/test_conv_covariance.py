"""The GPU's kernels of conv_covariance, run on the CPU, against the naive reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.ops import naive
from tests.cuda import emulated_conv_covariance as emulation
from tests.cuda.emulated_conv_covariance import conv_covariance_
from tests.ops.cases import DTYPES, arrange, covariance_error, poisoned
from tests.ops.test_conv_covariance import TOLERANCE, make_map, options, spikes


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@given(
    case=options(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "batch_last", "strided", "offset", "expanded_first"]),
    bias=st.booleans(),
)
def test_both_forms_equal_the_reference(case: dict[str, Any], dtype: torch.dtype, layout: str, bias: bool) -> None:
    x = make_map(case.pop("shape"), dtype, layout)
    expected = naive.conv_covariance(x.double(), **case, bias=bias, scale=0.5)
    for form in ("shift", "direct"):
        out = poisoned(tuple(expected.shape), accumulation(dtype))
        plan = conv_covariance_(out, x, **case, bias=bias, scale=0.5, form=form)
        assert plan.form == form or plan.boxes == 0
        assert torch.equal(out, out.mT)
        assert covariance_error(out, expected) <= TOLERANCE[dtype]


@given(
    case=options(),
    bias=st.booleans(),
    decay=st.sampled_from([0.0, 0.9]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    form=st.sampled_from(["shift", "direct"]),
)
def test_accumulates_into_any_matrix(case: dict[str, Any], bias: bool, decay: float, layout: str, form: str) -> None:
    x = torch.randn(case.pop("shape"))
    update = naive.conv_covariance(x.double(), **case, bias=bias, scale=0.5)
    if decay == 0:
        out, expected = poisoned(tuple(update.shape), torch.float32, layout), update
    else:
        old = torch.randn(update.shape)
        out, expected = arrange(old.clone(), layout), decay * old.double() + update
    conv_covariance_(out, x, **case, bias=bias, decay=decay, scale=0.5, form=form)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)


ACCURACY = [
    ((4, 8, 32, 32), [3, 3], [1, 1], [1, 1], [1, 1], 29),
    ((4, 17, 20, 21), [3, 3], [1, 1], [0, 0], [1, 1], 97),
    ((3, 20, 9, 11), [3, 3], [1, 1], [2, 0, 1, 3], [2, 1], None),
    ((2, 40, 7, 7), [3, 3], [1, 1], [1, 1], [1, 1], 29),
    ((2, 70, 6, 5), [3, 3], [2, 2], [1, 1], [1, 1], None),
    ((9, 3, 8, 8), [8, 7], [1, 1], [0, 0], [1, 1], None),  # a kernel nearly as large as the map
    ((9, 3, 8, 8), [7, 7], [1, 1], [3, 3], [1, 1], None),
    ((4, 3, 33, 32), [7, 7], [2, 2], [3, 3], [1, 1], None),  # phases of different sizes
    ((1, 3, 70, 71), [3, 3], [1, 1], [1, 1], [1, 1], 29),
    ((5, 4, 3000), [9], [1], [4], [1], None),
    ((2, 3, 9, 10, 11), [3, 2, 3], [1, 2, 1], [1, 1, 1], [1, 1, 2], None),
]


@pytest.mark.parametrize(
    "values", [torch.Tensor.clone, spikes, lambda x: torch.full_like(x, 0.1)], ids=["normal", "spikes", "constant"]
)
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation", "boxes"), ACCURACY)
def test_accuracy(
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    boxes: int | None,
    values: Callable[[Tensor], Tensor],
) -> None:
    x = values(torch.randn(shape))
    expected = naive.conv_covariance(x.double(), kernel, stride, padding, dilation, bias=True, scale=1 / shape[0])
    for form in ("shift", "direct"):
        out = poisoned(tuple(expected.shape), torch.float32)
        plan = conv_covariance_(out, x, kernel, stride, padding, dilation, bias=True, scale=1 / shape[0], form=form)
        assert plan.form == form
        if form == "shift" and boxes is not None:
            assert plan.boxes == boxes
        assert covariance_error(out, expected) <= 1e-5
        assert torch.linalg.eigvalsh(out.double()).min() >= -1e-5 * expected.diagonal().max()


PLANS = [
    ((64, 64, 16, 16), [3, 3], 1, 1, 1, "shift"),
    ((64, 64, 16, 16), [1, 1], 1, 0, 1, "shift"),
    ((64, 512, 7, 7), [3, 3], 1, 1, 1, "shift"),
    ((64, 128, 28, 28), [3, 3], 2, 1, 1, "shift"),
    ((64, 3, 32, 32), [3, 3], 1, 1, 1, "direct"),  # few channels
    ((16, 3, 64, 64), [16, 16], 16, 0, 1, "direct"),  # no two pairs of offsets coincide
    ((4, 64, 40, 1), [33, 1], 1, 16, 1, "direct"),  # too many pairs for tables
    ((64, 64, 14, 14), [3, 3], 1, 1, 64, "direct"),  # a channel of its own for each group
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "groups", "form"), PLANS)
def test_operations_decide(
    shape: tuple[int, ...], kernel: list[int], stride: int, padding: int, groups: int, form: str, dtype: torch.dtype
) -> None:
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert emulation.plan(x, kernel, [stride] * 2, [padding] * 2, [1, 1], groups).form == form


@pytest.mark.parametrize("form", ["shift", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sums_are_cut_into_parts(dtype: torch.dtype, form: str) -> None:
    x = torch.full((3, 2, 25, 25), 0.1, dtype=dtype)
    expected = naive.conv_covariance(x.double(), [2, 3], [1, 1], [1, 1], [1, 1], bias=True)
    out = poisoned(tuple(expected.shape), dtype)
    plan = conv_covariance_(out, x, [2, 3], [1, 1], [1, 1], [1, 1], bias=True, form=form)
    assert plan.parts > plan.boxes
    assert covariance_error(out, expected) <= (1e-13 if dtype == torch.float64 else 5e-6)


TENSOR_CORES = [
    ((3, 64, 9, 9), [3, 3], [1, 1], [1, 1], 1, "contiguous"),
    ((3, 64, 9, 9), [3, 3], [1, 1], [1, 1], 1, "channels_last"),  # in place
    ((2, 70, 6, 7), [3, 3], [2, 2], [1, 1], 1, "channels_last"),  # rows are no multiples of 16 bytes
    ((2, 130, 6, 5), [2, 2], [1, 1], [0, 0], 1, "contiguous"),  # several large tiles
    ((2, 40, 8, 8), [3, 3], [1, 1], [1, 1], 5, "contiguous"),
    ((2, 6, 8, 8), [3, 3], [1, 1], [1, 1], 2, "contiguous"),  # groups begin anywhere
    ((1, 8, 1200), [3], [1], [1], 1, "contiguous"),  # many runs of positions, several parts
]


@pytest.mark.parametrize("form", ["shift", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "groups", "layout"), TENSOR_CORES)
def test_tensor_cores(
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    layout: str,
    dtype: torch.dtype,
    form: str,
) -> None:
    x = make_map(shape, dtype, layout)
    dilation = [1] * len(kernel)
    expected = naive.conv_covariance(x.double(), kernel, stride, padding, dilation, groups, bias=True)
    out = poisoned(tuple(expected.shape), torch.float32)
    conv_covariance_(out, x, kernel, stride, padding, dilation, groups, bias=True, form=form, tf32=True)
    assert torch.equal(out, out.mT)
    # TF32 keeps 11 bits of each factor.
    error = covariance_error(out, expected)
    assert error <= (1e-3 if dtype == torch.float32 else 1e-5)
    if dtype == torch.float32:
        assert error > 1e-5
        torch.testing.assert_close(out[..., -1, :].double(), expected[..., -1, :], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["shift", "direct"])
def test_non_finite_entries_stay_in_their_channel(form: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    x[1, 1, 2, 3] = float("inf")
    expected = naive.conv_covariance(x.double(), [3, 3], [1, 1], [1, 1], [1, 1])
    out = poisoned(tuple(expected.shape), torch.float32)
    conv_covariance_(out, x, [3, 3], [1, 1], [1, 1], [1, 1], form=form)
    channel = torch.arange(27) // 9
    clean = (channel[:, None] != 1) & (channel != 1)
    assert out[clean].isfinite().all()
    assert (~out[9:18, 9:18].diagonal().isfinite()).all()
    torch.testing.assert_close(out[clean].double(), expected[clean], rtol=1e-5, atol=1e-5)
