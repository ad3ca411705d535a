"""second_moment_ against the naive reference in float64, and as an operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronfac.ops import naive, second_moment_
from tests.ops.cases import DTYPES, LAYOUTS, arrange, poisoned, threads

SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 24, 25, 48, 49, 60, 100, 200])


def bounded_error(actual: Tensor, expected: Tensor, g: Tensor, x: Tensor, bias: bool, scale: float) -> float:
    """The largest error relative to sum_n (|g_n|^T |[x_n 1]|)^2, what the products add up to without cancellation."""
    bound = torch.zeros_like(expected)
    naive.second_moment_(bound, g.double().abs(), x.double().abs(), bias, 0.0, scale)
    error = (actual.double() - expected).abs()
    assert not error.isnan().any()
    return (error / bound.clamp_min(1e-30)).max().item() if error.numel() else 0.0


@given(
    n=st.sampled_from([0, 1, 2, 5, 33]),
    t=st.sampled_from([0, 1, 1, 2, 7, 50]),
    o=SIZES,
    d=SIZES,
    dtype=st.sampled_from(DTYPES),
    layout_g=st.sampled_from(LAYOUTS),
    layout_x=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    count=st.sampled_from([1, 2, 3]),
)
def test_equals_the_reference(
    n: int,
    t: int,
    o: int,
    d: int,
    dtype: torch.dtype,
    layout_g: str,
    layout_x: str,
    bias: bool,
    count: int,
) -> None:
    g = arrange(torch.randn(n, t, o, dtype=torch.float64).to(dtype), layout_g)
    x = arrange(torch.randn(n, t, d, dtype=torch.float64).to(dtype), layout_x)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = poisoned((o, d + bias), out_dtype)
    with threads(count):
        second_moment_(out, g, x, bias, 0.0, 0.5)
    expected = torch.empty(o, d + bias, dtype=torch.float64)
    naive.second_moment_(expected, g.double(), x.double(), bias, 0.0, 0.5)
    assert bounded_error(out, expected, g, x, bias, 0.5) <= (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "offset"])
@pytest.mark.parametrize("t", [1, 6])
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_accumulates(decay: float, t: int, layout: str) -> None:
    g, x = torch.randn(8, t, 50), torch.randn(8, t, 70)
    old = torch.randn(50, 71) if decay else torch.full((50, 71), float("nan"))
    out = arrange(old.clone(), layout)
    second_moment_(out, g, x, True, decay, 0.25)
    expected = old.double()
    naive.second_moment_(expected, g.double(), x.double(), True, decay, 0.25)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("n", "t", "o", "d"), [(3, 1500, 20, 30), (2000, 1, 20, 30), (40, 3, 450, 900), (300, 9, 10, 100)]
)
def test_partitions(n: int, t: int, o: int, d: int, count: int) -> None:
    """Long sums over positions and examples, several blocks of the result; the same bits twice."""
    g, x = torch.randn(n, t, o), torch.randn(n, t, d)
    results = [poisoned((o, d + 1), torch.float32) for _ in range(2)]
    with threads(count):
        for out in results:
            second_moment_(out, g, x, bias=True, scale=1 / n)
    assert torch.equal(*results)
    expected = torch.empty(o, d + 1, dtype=torch.float64)
    for start in range(0, n, 20):  # the reference forms N x o x d
        part = slice(start, start + 20)
        naive.second_moment_(expected, g[part].double(), x[part].double(), True, float(start > 0), 1 / n)
    assert bounded_error(results[0], expected, g[:20], x[:20], True, n / 20 / n) <= 1e-5


def test_equals_squared_per_example_gradients() -> None:
    """The definition: squares of the gradients that torch computes one example at a time."""
    weight, offset = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x, target = torch.randn(5, 3, 6, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)

    def loss(w: Tensor, b: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return (inputs @ w.mT + b - targets).square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))
    by_weight, by_offset = per_example(weight, offset, x, target)
    g = 2 * (x @ weight.mT + offset - target)
    out = torch.zeros(4, 7, dtype=torch.float64)
    second_moment_(out, g, x, bias=True)
    torch.testing.assert_close(out[:, :6], by_weight.square().sum(0))
    torch.testing.assert_close(out[:, 6], by_offset.square().sum(0))


def test_out_may_share_memory_with_inputs() -> None:
    memory = torch.randn(1, 2, 2)
    expected = memory[0].clone()
    naive.second_moment_(expected, memory.clone(), memory.clone(), False, 0.5)
    second_moment_(memory[0], memory, memory, decay=0.5)
    torch.testing.assert_close(memory[0], expected)


@pytest.mark.parametrize("name", ["g", "x", "out"])
def test_second_moment_refuses_gradients(name: str) -> None:
    tensors = {"out": torch.zeros(2, 3), "g": torch.randn(4, 1, 2), "x": torch.randn(4, 1, 3)}
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"kronfac::second_moment_: {name}: .*not differentiable"):
        second_moment_(**tensors)
    assert torch.equal(tensors["out"].detach(), torch.zeros(2, 3))


BAD_CALLS: list[tuple[str, dict[str, Any]]] = [
    (r"g: expected a 3-dimensional tensor \(N, T, o\), got shape \(4, 2\)", {"g": torch.ones(4, 2)}),
    (r"x: expected a 3-dimensional tensor \(N, T, d\), got shape \(4, 3\)", {"x": torch.ones(4, 3)}),
    (r"g: expected float32, .*got", {"g": torch.ones(4, 5, 2, dtype=torch.int64)}),
    (r"x: expected Float \(the type of g\), got BFloat16", {"x": torch.ones(4, 5, 3, dtype=torch.bfloat16)}),
    (r"x: expected shape \(4, 5, d\) .*got \(4, 1, 3\)", {"x": torch.ones(4, 1, 3)}),
    (r"out: expected shape \(2, 4\) .*with bias, got \(2, 3\)", {"bias": True}),
    (r"out: expected shape \(2, 3\) .*got \(3, 2\)", {"out": torch.ones(3, 2)}),
    (r"out: expected Float .*got Double", {"out": torch.ones(2, 3, dtype=torch.float64)}),
    (r"out: expected .* memory of their own, got an expanded one", {"out": torch.ones(3).expand(2, 3)}),
    (r"decay: expected a finite number >= 0, got", {"decay": float("nan")}),
    (r"scale: expected a finite number >= 0, got", {"scale": float("-inf")}),
]


@pytest.mark.parametrize(("message", "change"), BAD_CALLS)
def test_bad_input(message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "out": torch.ones(2, 3),
        "g": torch.ones(4, 5, 2),
        "x": torch.ones(4, 5, 3),
        **change,
    }
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match=f"kronfac::second_moment_: {message}"):
        second_moment_(**arguments)
    assert torch.equal(arguments["out"], before)


@pytest.mark.parametrize(
    ("n", "t", "layout"),
    [(3, 4, "contiguous"), (3, 4, "transposed"), (3, 4, "strided"), (3, 1, "strided"), (0, 4, "contiguous")],
)
def test_opcheck(n: int, t: int, layout: str) -> None:
    g, x = arrange(torch.randn(n, t, 2), layout), arrange(torch.randn(n, t, 3), layout)
    torch.library.opcheck(torch.ops.kronfac.second_moment_.default, (torch.randn(2, 4), g, x, True, 0.5, 2.0))


def test_compiles() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(out: Tensor, g: Tensor, x: Tensor) -> Tensor:
        second_moment_(out, 2 * g, x, False, 0.5, 0.1)
        return out.sqrt()

    for n, t, d in ((3, 4, 5), (2, 6, 3)):
        g, x, out = torch.randn(n, t, 2), torch.randn(n, t, d), torch.rand(2, d)
        expected = out.clone()
        naive.second_moment_(expected, 2 * g, x, False, 0.5, 0.1)
        result = step(out, g, x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(result, expected.sqrt())


@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("o", "d"), [(8, 48), (16, 144), (16, 27), (24, 95), (4, 50), (13, 96), (48, 97)])
@pytest.mark.parametrize("t", [2, 511, 512, 513, 1100])
def test_few_outputs_over_many_positions(t: int, o: int, d: int, bias: bool, layout: str) -> None:
    """Rows of the inputs are read in place, as far as whole panels go; what lies between them is not touched."""
    g, x = arrange(torch.randn(3, t, o), layout), arrange(torch.randn(3, t, d), layout)
    out, expected = poisoned((o, d + bias), torch.float32), torch.empty(o, d + bias, dtype=torch.float64)
    second_moment_(out, g, x, bias, 0.0, 0.5)
    naive.second_moment_(expected, g.double(), x.double(), bias, 0.0, 0.5)
    assert bounded_error(out, expected, g, x, bias, 0.5) <= 1e-5
