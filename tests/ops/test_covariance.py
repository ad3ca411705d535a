"""covariance and covariance_ against the naive reference in float64, and as operators."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.ops import covariance, covariance_, naive
from tests.ops.cases import DTYPES, LAYOUTS, arrange, covariance_error, poisoned, threads

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# Around the register tiles of every instruction set, and nothing at all.
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 23, 24, 25, 47, 48, 49, 63, 64, 65, 96, 100, 145])
ROWS = st.sampled_from([0, 1, 2, 15, 16, 17, 100, 191, 192, 193, 255, 256, 257, 520, 1100])


def reference(x: Tensor, bias: bool, scale: float) -> Tensor:
    return naive.covariance(x.double(), bias, scale)


@given(
    m=ROWS,
    d=SIZES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 1 / 3, 0.0]),
    count=st.sampled_from([1, 2, 3]),
)
def test_equals_the_reference(
    m: int, d: int, dtype: torch.dtype, layout: str, bias: bool, scale: float, count: int
) -> None:
    x = arrange(torch.randn(m, d, dtype=torch.float64).to(dtype), layout)
    with threads(count):
        result = covariance(x, bias, scale)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.is_contiguous()
    assert torch.equal(result, result.mT)
    assert covariance_error(result, reference(x, bias, scale)) <= TOLERANCE[dtype]


@given(
    m=ROWS,
    d=SIZES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "offset"]),
    bias=st.booleans(),
    decay=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    count=st.sampled_from([1, 2, 3]),
)
def test_accumulates_into_any_matrix(
    m: int, d: int, dtype: torch.dtype, layout: str, bias: bool, decay: float, count: int
) -> None:
    x = torch.randn(m, d, dtype=torch.float64).to(dtype)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    old = torch.randn(d + bias, d + bias, dtype=out_dtype)  # not symmetric
    out = arrange(old.clone(), layout)
    with threads(count):
        covariance_(out, x, bias, decay, 0.5)
    update = reference(x, bias, 0.5)
    expected = decay * old.double() + update
    norms = update.diagonal().sqrt()
    bound = TOLERANCE[dtype] * (norms[:, None] * norms + old.abs())
    assert ((out - expected).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("m", [0, 5, 3000])
def test_decay_zero_does_not_read_out(m: int, count: int, layout: str) -> None:
    x = torch.randn(m, 70)
    out = poisoned((71, 71), torch.float32, layout)
    with threads(count):
        covariance_(out, x, bias=True)
        assert torch.equal(out, covariance(x, bias=True))


def test_a_symmetric_matrix_stays_symmetric() -> None:
    out = covariance(torch.randn(50, 150))
    for _ in range(3):
        covariance_(out, torch.randn(40, 150), decay=0.9, scale=0.3)
    assert torch.equal(out, out.mT)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("m", "d"), [(40, 1100), (700, 460), (9000, 60), (20000, 30)])
def test_partitions(m: int, d: int, count: int) -> None:
    """Several panels of rows, sums split over k, sums longer than a run."""
    x = torch.randn(m, d)
    with threads(count):
        result = covariance(x, bias=True, scale=1 / m)
        assert covariance_error(result, reference(x, True, 1 / m)) <= 1e-5
        assert torch.equal(result, covariance(x, bias=True, scale=1 / m))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["normal", "constant", "positive", "spikes", "scales"])
def test_accuracy_of_long_sums(kind: str, count: int) -> None:
    m, d = 100_000, 20
    x = {
        "normal": lambda: torch.randn(m, d),
        "constant": lambda: torch.full((m, d), 0.1) * torch.arange(1, d + 1),
        "positive": lambda: torch.rand(m, d),
        "spikes": lambda: torch.randn(m, d) + 1e3 * (torch.rand(m, d) < 1e-3),
        "scales": lambda: torch.randn(m, d) * torch.logspace(-4, 4, d),
    }[kind]()
    with threads(count):
        assert covariance_error(covariance(x, bias=True, scale=1 / m), reference(x, True, 1 / m)) <= 1e-5


def test_small_halves_are_exact() -> None:
    """Subnormal and largest numbers of the narrow types survive their conversion."""
    for dtype, values in (
        (torch.float16, [6e-8, -3e-5, 6e-5, 65504.0, 0.0, -0.0]),
        (torch.bfloat16, [1e-30, -3e-5, 1e15, 0.0]),
    ):
        x = torch.tensor([values]).to(dtype)
        assert torch.equal(covariance(x), x.float().mT @ x.float())
    nonfinite = torch.tensor([[float("inf"), float("nan"), 1.0]])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(covariance(nonfinite.to(dtype)).isnan(), (nonfinite.mT @ nonfinite).isnan())


def test_nonfinite_columns_stay_where_they_are() -> None:
    x = torch.randn(30, 60)
    x[3, 7] = float("nan")
    result = covariance(x, bias=True)
    touched = torch.zeros(61, 61, dtype=torch.bool)
    touched[7] = touched[:, 7] = True
    assert torch.equal(result.isnan(), touched)


def test_out_may_share_memory_with_x() -> None:
    memory = torch.randn(8, 8)
    expected = 0.5 * memory + memory.mT @ memory
    covariance_(memory, memory, decay=0.5)
    torch.testing.assert_close(memory, expected)
    memory = torch.randn(12, 8)
    x, out = memory[2:], memory[:8]
    expected = naive.covariance(x)
    covariance_(out, x)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return covariance(x, bias, 0.7)

    for x in (torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64).mT):
        x.requires_grad_()
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_equals_that_of_the_reference(dtype: torch.dtype) -> None:
    x = torch.randn(20, 9).to(dtype).requires_grad_()
    weight = torch.randn(10, 10)
    (gradient,) = torch.autograd.grad((covariance(x, True, 0.1) * weight).sum(), x)
    (expected,) = torch.autograd.grad((naive.covariance(x, True, 0.1) * weight).sum(), x)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)


def test_covariance_accumulation_refuses_gradients() -> None:
    x, out = torch.randn(3, 2, requires_grad=True), torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"kronfac::covariance_: x: .*not differentiable"):
        covariance_(out, x)
    assert torch.equal(out, torch.zeros(2, 2))
    with torch.no_grad():
        covariance_(out, x)
    assert torch.equal(out, covariance(x.detach()))


GOOD_X, GOOD_OUT = torch.ones(3, 2), torch.ones(2, 2)
BAD_CALLS: list[tuple[str, dict[str, Any]]] = [
    (r"x: expected a 2-dimensional tensor \(m, d\), got shape \(3,\)", {"x": torch.ones(3)}),
    (r"x: expected a 2-dimensional tensor .*got shape \(1, 3, 2\)", {"x": torch.ones(1, 3, 2)}),
    (r"x: expected float32, float64, bfloat16 or float16, got", {"x": torch.ones(3, 2, dtype=torch.int64)}),
    (r"x: expected float32, float64, bfloat16 or float16, got", {"x": torch.ones(3, 2, dtype=torch.complex64)}),
    (r"scale: expected a finite number >= 0, got", {"scale": float("nan")}),
    (r"scale: expected a finite number >= 0, got", {"scale": -1.0}),
    (r"decay: expected a finite number >= 0, got", {"decay": float("inf")}),
    (r"decay: expected a finite number >= 0, got", {"decay": -0.1}),
    (r"out: expected shape \(3, 3\) .*with bias, got \(2, 2\)", {"bias": True}),
    (r"out: expected shape \(2, 2\) .*got \(3, 2\)", {"out": torch.ones(3, 2)}),
    (r"out: expected Float .*got BFloat16", {"out": torch.ones(2, 2, dtype=torch.bfloat16)}),
    (r"out: expected Double .*got Float", {"x": torch.ones(3, 2, dtype=torch.float64)}),
    (r"out: expected .* memory of their own, got an expanded one", {"out": torch.ones(1, 2).expand(2, 2)}),
]


@pytest.mark.parametrize(("message", "change"), BAD_CALLS)
def test_bad_input(message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"out": GOOD_OUT.clone(), "x": GOOD_X, **change}
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match=f"kronfac::covariance_: {message}"):
        covariance_(**arguments)
    assert torch.equal(arguments["out"], before)
    if not {"out", "decay", "bias"} & set(change) and "out:" not in message:
        del arguments["out"]
        with pytest.raises(RuntimeError, match=f"kronfac::covariance: {message}"):
            covariance(**arguments)


def test_mixed_devices() -> None:
    with pytest.raises(RuntimeError, match=r"kronfac::covariance_: out: expected the device of x"):
        covariance_(torch.ones(2, 2), torch.ones(3, 2, device="meta"))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("shape", [(5, 3), (0, 3), (4, 0)])
def test_opcheck(shape: tuple[int, int], layout: str) -> None:
    x = arrange(torch.randn(shape), layout)
    torch.library.opcheck(torch.ops.kronfac.covariance.default, (x, True, 0.5))
    torch.library.opcheck(torch.ops.kronfac.covariance.default, (x.double().requires_grad_(), True, 0.5))
    d = shape[1]
    torch.library.opcheck(torch.ops.kronfac.covariance_.default, (torch.randn(d, d), x, False, 0.5, 2.0))


def test_compiles() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(out: Tensor, x: Tensor) -> Tensor:
        y = 2 * x
        covariance_(out, y, True, 0.5, 0.1)
        return covariance(y.bfloat16(), True) + out

    for m, d in itertools.product((3, 7), (2, 5)):
        x, out = torch.randn(m, d), torch.randn(d + 1, d + 1)
        expected = 0.5 * out + naive.covariance(2 * x, True, 0.1)
        result = step(out, x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(result, naive.covariance((2 * x).bfloat16(), True) + expected)


def test_compiled_gradient() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        return covariance(x, True, 0.5).square().sum()

    x = torch.randn(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    (expected,) = torch.autograd.grad(naive.covariance(x, True, 0.5).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    @torch.compile(fullgraph=True)
    def step(out: Tensor, x: Tensor) -> Tensor:
        covariance_(out, x.sin(), False, 0.5, 0.1)
        return covariance(x.cos()) + out

    x, out = torch.randn(9, 4), torch.randn(4, 4)
    expected = 0.5 * out + naive.covariance(x.sin(), scale=0.1)
    torch.testing.assert_close(step(out, x), naive.covariance(x.cos()) + expected)
    torch.testing.assert_close(out, expected)
