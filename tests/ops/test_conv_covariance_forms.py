"""The forms of conv_covariance, forced one by one: patches, and shifted products with each axis in each form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronfac.ops import conv_covariance, conv_covariance_, naive
from tests.ops.cases import DTYPES, covariance_error, poisoned, threads
from tests.ops.test_conv_covariance import TOLERANCE, make_map, options, spikes

VARIABLE = "KRONFAC_CONV_COVARIANCE"
AXIS_FORMS = [f"shift:{a}{b}{c}" for a in "csd" for b in "csd" for c in "csd"]


@given(
    case=options(),
    form=st.sampled_from(AXIS_FORMS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "batch_last", "strided", "offset", "expanded_first"]),
    bias=st.booleans(),
    count=st.sampled_from([1, 2, 3, 7]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_form_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    case: dict[str, Any],
    form: str,
    dtype: torch.dtype,
    layout: str,
    bias: bool,
    count: int,
) -> None:
    x = make_map(case.pop("shape"), dtype, layout)
    expected = naive.conv_covariance(x.double(), **case, bias=bias, scale=0.5)
    with threads(count):
        monkeypatch.setenv(VARIABLE, form)
        shifted = conv_covariance(x, **case, bias=bias, scale=0.5)
        again = conv_covariance(x, **case, bias=bias, scale=0.5)
        monkeypatch.setenv(VARIABLE, "direct")
        direct = conv_covariance(x, **case, bias=bias, scale=0.5)
    assert torch.equal(shifted, again)
    assert torch.equal(shifted, shifted.mT)
    assert covariance_error(shifted, expected) <= TOLERANCE[dtype]
    assert covariance_error(direct, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("count", [1, 2, 64])
@pytest.mark.parametrize(
    "values", [torch.Tensor.clone, spikes, lambda x: torch.full_like(x, 0.1)], ids=["normal", "spikes", "constant"]
)
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation"),
    [
        ((32, 16, 32, 32), [3, 3], [1, 1], [1, 1], [1, 1]),
        ((4, 17, 20, 21), [3, 3], [1, 1], [0, 0], [1, 1]),
        ((3, 20, 9, 11), [3, 3], [1, 1], [2, 0, 1, 3], [2, 1]),
        ((2, 40, 7, 7), [3, 3], [1, 1], [1, 1], [1, 1]),
        ((16, 5, 8, 8), [8, 7], [1, 1], [0, 0], [1, 1]),  # a kernel nearly as large as the map
        ((16, 5, 8, 8), [7, 7], [1, 1], [3, 3], [1, 1]),
        ((8, 3, 33, 32), [7, 7], [2, 2], [3, 3], [1, 1]),  # phases of different sizes
        ((1, 3, 300, 301), [3, 3], [1, 1], [1, 1], [1, 1]),  # one image: bands of it
        ((5, 4, 5000), [9], [1], [4], [1]),
        ((2, 3, 9, 10, 11), [3, 2, 3], [1, 2, 1], [1, 1, 1], [1, 1, 2]),
    ],
)
def test_accuracy_of_shifts(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    values: Callable[[Tensor], Tensor],
    count: int,
) -> None:
    monkeypatch.setenv(VARIABLE, "shift:ccc")
    x = values(torch.randn(shape))
    with threads(count):
        result = conv_covariance(x, kernel, stride, padding, dilation, bias=True, scale=1 / shape[0])
        again = conv_covariance(x, kernel, stride, padding, dilation, bias=True, scale=1 / shape[0])
    assert torch.equal(result, again)
    expected = naive.conv_covariance(x.double(), kernel, stride, padding, dilation, bias=True, scale=1 / shape[0])
    assert covariance_error(result, expected) <= 1e-5
    assert torch.linalg.eigvalsh(result.double()).min() >= -1e-5 * expected.diagonal().max()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_shifts_accumulate_into_any_matrix(monkeypatch: pytest.MonkeyPatch, decay: float, layout: str) -> None:
    monkeypatch.setenv(VARIABLE, "shift")
    arguments: tuple[Any, ...] = ([3, 3], [1, 1], [1, 1], [1, 1], 2, True)
    x = torch.randn(3, 34, 6, 5)
    update = naive.conv_covariance(x.double(), *arguments)
    out = poisoned(tuple(update.shape), torch.float32, layout)
    if decay > 0:
        out.copy_(torch.randn(update.shape))
    expected = update if decay == 0 else decay * out.double() + update
    conv_covariance_(out, x, *arguments, decay)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_groups_and_threads(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Fewer groups than threads, as many, and more."""
    x = torch.randn(5, 18, 10, 9)
    expected = naive.conv_covariance(x.double(), [3, 3], [1, 1], [1, 1], [1, 1], groups)
    monkeypatch.setenv(VARIABLE, "shift")
    for count in (1, 3, 4):
        with threads(count):
            assert covariance_error(conv_covariance(x, [3, 3], [1, 1], [1, 1], [1, 1], groups), expected) <= 1e-5


@pytest.mark.cpu_only("what may be forced there is in tests/cuda/test_on_device.py")
def test_a_form_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("shifts", "shift:cc", "shift:abc", "Direct"):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(RuntimeError, match=f"{VARIABLE}: expected direct, shift, .*got {value}"):
            conv_covariance(torch.ones(1, 1, 4), [3], [1], [0], [1])
