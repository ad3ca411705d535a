"""conv_covariance and conv_covariance_ against unfold in float64, and as operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.ops import conv_covariance, conv_covariance_, covariance, naive
from tests.ops.cases import DTYPES, arrange, covariance_error, poisoned, threads

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def make_map(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A random map; "channels_last" keeps channels together, "batch_last" examples."""
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "batch_last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return arrange(x, layout)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.integers(1, 3))
    largest = {1: 7, 2: 5, 3: 3}[axes]

    def entries(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    kernel, stride, dilation = entries(1, largest), entries(1, 3), entries(1, 2 if axes > 1 else 3)
    if draw(st.booleans()):
        padding = entries(0, 3)
        sides = [(p, p) for p in padding]
    else:
        sides = list(zip(entries(0, 3), entries(0, 3), strict=True))
        padding = [p for pair in sides for p in pair]
    # From the smallest map the kernel fits into to a few more entries.
    size = [
        max(1, d * (k - 1) + 1 - low - high) + extra
        for k, d, (low, high), extra in zip(kernel, dilation, sides, entries(0, 6), strict=True)
    ]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 4))
    return {
        "shape": (draw(st.integers(0, 3)), channels, *size),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


@given(
    case=options(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "batch_last", "strided", "offset", "expanded_first"]),
    bias=st.booleans(),
    count=st.sampled_from([1, 2, 3]),
)
def test_equals_the_reference(case: dict[str, Any], dtype: torch.dtype, layout: str, bias: bool, count: int) -> None:
    x = make_map(case.pop("shape"), dtype, layout)
    with threads(count):
        result = conv_covariance(x, **case, bias=bias, scale=0.5)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.is_contiguous()
    assert torch.equal(result, result.mT)
    expected = naive.conv_covariance(x.double(), **case, bias=bias, scale=0.5)
    assert result.shape == expected.shape
    assert covariance_error(result, expected) <= TOLERANCE[dtype]


@given(
    case=options(),
    bias=st.booleans(),
    decay=st.sampled_from([0.0, 0.9]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
)
def test_accumulates_into_any_matrix(case: dict[str, Any], bias: bool, decay: float, layout: str) -> None:
    x = torch.randn(case.pop("shape"))
    update = naive.conv_covariance(x.double(), **case, bias=bias, scale=0.5)
    if decay == 0:
        out, expected = poisoned(tuple(update.shape), torch.float32, layout), update
    else:
        old = torch.randn(update.shape)
        out, expected = arrange(old.clone(), layout), decay * old.double() + update
    conv_covariance_(out, x, **case, bias=bias, decay=decay, scale=0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)


def test_equals_torch_unfold() -> None:
    """The feature order is that of `torch.nn.functional.unfold` and of a convolution's weight."""
    x = torch.randn(3, 5, 9, 8, dtype=torch.float64)
    for kernel, stride, padding, dilation in (([3, 3], [1, 1], [1, 1], [1, 1]), ([4, 2], [2, 3], [2, 0], [1, 2])):
        columns = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
        rows = columns.mT.reshape(-1, columns.shape[1])
        torch.testing.assert_close(conv_covariance(x, kernel, stride, padding, dilation), rows.mT @ rows)
        weight = torch.randn(7, 5, *kernel, dtype=torch.float64)
        outputs = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation)
        flat = weight.flatten(1)
        torch.testing.assert_close(
            flat @ conv_covariance(x, kernel, stride, padding, dilation) @ flat.mT,
            torch.einsum("nahw,nbhw->ab", outputs, outputs),
        )


def spikes(x: Tensor) -> Tensor:
    """Border entries of 10^3."""
    x = x.clone()
    for axis in range(2, x.dim()):
        x.select(axis, 0).mul_(1e3)
        x.select(axis, -1).mul_(1e3)
    return x


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("values", [torch.Tensor.clone, spikes, torch.ones_like], ids=["normal", "spikes", "constant"])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((32, 4, 32, 32), [3, 3], [1, 1], [1, 1]),
        ((32, 4, 32, 32), [3, 3], [1, 1], [0, 0]),
        ((32, 3, 33, 32), [7, 7], [2, 2], [3, 3]),
        ((64, 3, 8, 8), [7, 7], [1, 1], [3, 3]),
        ((64, 3, 8, 8), [8, 7], [1, 1], [0, 0]),
        ((50, 2, 2000), [5], [1], [2]),
        ((4, 2, 12, 12, 12), [3, 3, 3], [1, 1, 1], [1, 1, 1]),
    ],
)
def test_accuracy(
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    values: Callable[[Tensor], Tensor],
    count: int,
) -> None:
    x = values(torch.randn(shape))
    dilation = [1] * len(kernel)
    with threads(count):
        result = conv_covariance(x, kernel, stride, padding, dilation, bias=True, scale=1 / shape[0])
        again = conv_covariance(x, kernel, stride, padding, dilation, bias=True, scale=1 / shape[0])
    assert torch.equal(result, again)
    expected = naive.conv_covariance(x.double(), kernel, stride, padding, dilation, bias=True, scale=1 / shape[0])
    assert covariance_error(result, expected) <= 1e-5
    assert torch.linalg.eigvalsh(expected).min() >= -1e-6 * expected.diagonal().max()
    assert torch.linalg.eigvalsh(result.double()).min() >= -1e-5 * expected.diagonal().max()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_depthwise(layout: str, count: int) -> None:
    x = make_map((4, 6, 9, 9), torch.float32, layout)
    with threads(count):
        result = conv_covariance(x, [3, 3], [1, 1], [1, 1], [1, 1], groups=6, bias=True)
    assert result.shape == (6, 10, 10)
    for channel in range(6):
        single = conv_covariance(x[:, channel : channel + 1], [3, 3], [1, 1], [1, 1], [1, 1], bias=True)
        torch.testing.assert_close(result[channel], single)


def test_pointwise_is_covariance() -> None:
    x = torch.randn(3, 7, 5, 4)
    rows = x.movedim(1, -1).reshape(-1, 7)
    torch.testing.assert_close(conv_covariance(x, [1, 1], [1, 1], [0, 0], [1, 1], bias=True), covariance(rows, True))


def test_many_features() -> None:
    """Several panels of rows, and several threads inside them."""
    x = torch.randn(2, 130, 5, 5)
    expected = naive.conv_covariance(x.double(), [3, 3], [1, 1], [1, 1], [1, 1])
    for count in (1, 2):
        with threads(count):
            assert covariance_error(conv_covariance(x, [3, 3], [1, 1], [1, 1], [1, 1]), expected) <= 1e-5


def test_one_spatial_axis_reads_two_entries_as_low_and_high() -> None:
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (3, 1))
    torch.testing.assert_close(conv_covariance(x, [3], [1], [3, 1], [1]), conv_covariance(padded, [3], [1], [0], [1]))


def test_out_may_share_memory_with_x() -> None:
    memory = torch.randn(2, 2, 5, 5)
    out = memory.view(-1)[:64].view(8, 8)
    expected = naive.conv_covariance(memory, [2, 2], [1, 1], [0, 0], [1, 1])
    conv_covariance_(out, memory, [2, 2], [1, 1], [0, 0], [1, 1])
    torch.testing.assert_close(out, expected)


GRADIENT_CASES: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [
    ((1, 2, 6), ([3], [2], [2, 1], [2], 1, True)),
    ((1, 2, 3, 5), ([2, 3], [1, 2], [1, 0], [1, 2], 1, True)),
    ((1, 4, 3, 2), ([2, 2], [2, 1], [0, 1, 1, 0], [1, 1], 2, False)),
    ((1, 2, 3, 3, 2), ([2, 2, 1], [1, 2, 1], [1, 0, 0], [1, 1, 1], 2, True)),
]


@pytest.mark.parametrize(("shape", "arguments"), GRADIENT_CASES)
def test_gradients(shape: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    def function(x: Tensor) -> Tensor:
        return conv_covariance(x, *arguments, scale=0.7)

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with threads(1):  # thousands of tiny convolutions
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_gradient_of_nothing() -> None:
    x = torch.randn(0, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv_covariance(x, [3, 3], [1, 1], [1, 1], [1, 1], bias=True).sum(), x)
    assert gradient.shape == x.shape


def test_conv_covariance_accumulation_refuses_gradients() -> None:
    x, out = torch.randn(1, 1, 3, requires_grad=True), torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"kronfac::conv_covariance_: x: .*not differentiable"):
        conv_covariance_(out, x, [2], [1], [0], [1])
    assert torch.equal(out, torch.zeros(2, 2))


BAD_CALLS: list[tuple[str, dict[str, Any]]] = [
    (r"x: expected a tensor \(N, C, \*spatial\) .* got shape \(2, 4\)", {"x": torch.ones(2, 4)}),
    (r"x: expected a tensor .* got shape \(1, 1, 1, 1, 1, 1\)", {"x": torch.ones(1, 1, 1, 1, 1, 1)}),
    (r"x: expected float32, .* got", {"x": torch.ones(1, 2, 4, 4, dtype=torch.int32)}),
    (r"kernel_size: expected 2 entries, .* got \[3\]", {"kernel_size": [3]}),
    (r"kernel_size: expected entries >= 1, got \[3, 0\]", {"kernel_size": [3, 0]}),
    (r"kernel_size: expected the dilated kernel to fit .* got 7 > 6 on spatial axis 1", {"kernel_size": [3, 7]}),
    (r"stride: expected 2 entries, .* got \[1, 1, 1\]", {"stride": [1, 1, 1]}),
    (r"stride: expected entries >= 1, got \[0, 1\]", {"stride": [0, 1]}),
    (r"padding: expected 2 or 4 entries .* got \[1, 1, 1\]", {"padding": [1, 1, 1]}),
    (r"padding: expected entries >= 0, got \[1, -1\]", {"padding": [1, -1]}),
    (r"dilation: expected entries >= 1, got \[1, -2\]", {"dilation": [1, -2]}),
    (r"groups: expected a positive divisor of the 2 channels of x, got 3", {"groups": 3}),
    (r"groups: expected a positive divisor of the 2 channels of x, got 0", {"groups": 0}),
    (r"scale: expected a finite number >= 0, got", {"scale": float("nan")}),
    (r"decay: expected a finite number >= 0, got", {"decay": -1.0}),
    (r"out: expected shape \[19, 19\], got \(18, 18\)", {"bias": True}),
    (r"out: expected shape \[2, 9, 9\], got \(18, 18\)", {"groups": 2}),
    (r"out: expected Float .*got Double", {"out": torch.ones(18, 18, dtype=torch.float64)}),
    (r"out: expected .* memory of their own, got an expanded one", {"out": torch.ones(18).expand(18, 18)}),
]


@pytest.mark.parametrize(("message", "change"), BAD_CALLS)
def test_bad_input(message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "out": torch.ones(18, 18),
        "x": torch.ones(1, 2, 4, 4),
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        **change,
    }
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match=f"kronfac::conv_covariance_: {message}"):
        conv_covariance_(**arguments)
    assert torch.equal(arguments["out"], before)
    if not message.startswith(("out", "decay")):
        del arguments["out"]
        with pytest.raises(RuntimeError, match=f"kronfac::conv_covariance: {message}"):
            conv_covariance(**arguments)
        # Tracing fails as running does.
        arguments["x"] = arguments["x"].to("meta")
        with pytest.raises(RuntimeError, match=f"kronfac::conv_covariance: {message}"):
            conv_covariance(**arguments)


OPCHECK_CASES: list[tuple[tuple[int, ...], str, tuple[Any, ...]]] = [
    ((2, 4, 5, 4), "contiguous", ([3, 2], [1, 2], [1, 0], [1, 1], 2, True)),
    ((2, 4, 5, 4), "strided", ([3, 2], [1, 2], [1, 0, 2, 1], [2, 1], 1, False)),
    ((0, 2, 5), "contiguous", ([3], [1], [1], [1], 1, True)),
    ((1, 2, 3, 4, 3), "channels_last", ([2, 2, 2], [1, 1, 1], [0, 0, 0], [1, 1, 1], 1, False)),
]


@pytest.mark.parametrize(("shape", "layout", "arguments"), OPCHECK_CASES)
def test_opcheck(shape: tuple[int, ...], layout: str, arguments: tuple[Any, ...]) -> None:
    x = make_map(shape, torch.float32, layout)
    torch.library.opcheck(torch.ops.kronfac.conv_covariance.default, (x, *arguments))
    if layout == "strided":
        torch.library.opcheck(torch.ops.kronfac.conv_covariance.default, (x.double().requires_grad_(), *arguments))
    out = torch.randn(conv_covariance(x, *arguments).shape)
    torch.library.opcheck(torch.ops.kronfac.conv_covariance_.default, (out, x, *arguments, 0.5, 2.0))


def test_compiles() -> None:
    arguments: tuple[Any, ...] = ([3, 2], [2, 1], [1, 0, 1, 1], [1, 2], 1, True)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(out: Tensor, x: Tensor) -> Tensor:
        conv_covariance_(out, 2 * x, *arguments, decay=0.5)
        return conv_covariance(x, *arguments) + out

    for n, size in ((2, 7), (3, 9), (5, 6)):
        x, out = torch.randn(n, 3, size, size + 1), torch.randn(19, 19)
        expected = 0.5 * out + naive.conv_covariance(2 * x, *arguments)
        result = step(out, x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(result, naive.conv_covariance(x, *arguments) + expected)


def test_compiled_gradient() -> None:
    arguments: tuple[Any, ...] = ([3, 2], [2, 1], [1, 0, 1, 1], [1, 2], 1, True)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        return conv_covariance(x, *arguments).square().sum()

    x = torch.randn(2, 3, 7, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    (expected,) = torch.autograd.grad(naive.conv_covariance(x, *arguments).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)
