"""kronfac::kron_precondition against the float64 definition."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from kronfac.ops import kron_precondition, naive

# dtype of the gradient, of the factors
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
Layer = tuple[Tensor, Tensor, Tensor]


def relayout(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.full((2 * x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)[::2, ::3].copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def make_layer(o: int, i: int, grad: torch.dtype, factor: torch.dtype, layout: str = "contiguous") -> Layer:
    values = torch.randn(o, i).to(grad), torch.randn(o, o, dtype=factor), torch.randn(i, i, dtype=factor)
    a, b, c = (relayout(x, layout) for x in values)
    return a, b, c


def assert_like_the_definition(layers: list[Layer]) -> None:
    grads, left, right = (list(column) for column in zip(*layers, strict=True))
    out, dots = kron_precondition(grads, left, right)
    wide = [[x.double() for x in column] for column in (grads, left, right)]
    expected, expected_dots = naive.kron_precondition(*wide)
    assert dots.dtype == left[0].dtype
    assert dots.shape == (len(layers),)
    for i, (grad, outer, inner) in enumerate(layers):
        assert out[i].dtype == grad.dtype
        assert out[i].shape == grad.shape
        assert out[i].is_contiguous()
        if grad.numel() == 0:
            assert dots[i] == 0
            continue
        # |L| |V| |R| bounds every partial sum, so it is what rounding errors scale with.
        bound = outer.double().abs() @ grad.double().abs() @ inner.double().abs()
        eps = torch.finfo(outer.dtype).eps
        error = (out[i].double() - expected[i]).abs()
        assert bool((error <= 4 * eps * bound + torch.finfo(grad.dtype).eps * expected[i].abs() + 1e-7).all())
        total = (bound * grad.double().abs()).sum()
        assert abs(float(dots[i]) - float(expected_dots[i])) <= 2 * eps * float(total)


@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=6),
    dtypes=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    seed=st.integers(0, 1000),
)
def test_ragged_lists_of_any_layout(
    shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, torch.dtype], layout: str, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_like_the_definition([make_layer(o, i, *dtypes, layout) for o, i in shapes])


# Large enough to be cut into slices: along columns, along rows, and unevenly.
@pytest.mark.parametrize("shape", [(40, 500), (500, 40), (301, 300), (10, 2100), (1, 700)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_sliced_layers(shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    assert_like_the_definition([make_layer(*shape, *dtypes), make_layer(7, 5, *dtypes)])


def test_layers_may_mix_gradient_types() -> None:
    assert_like_the_definition(
        [make_layer(20, 30, grad, torch.float32) for grad, factor in DTYPES if factor == torch.float32]
    )


def test_rounding_to_narrow_types_is_torchs() -> None:
    values = torch.tensor(
        [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 1 / 3, 65504.0, 65519.0, 65520.0, 1e-7, 6e-8, 2.9e-8]
    )
    values = torch.cat([values, torch.tensor([3.1e-8, 6.1e-5, 3.3e38, 1e-40, -2.5, torch.inf, -torch.inf, torch.nan])])
    values = torch.cat([values, torch.randn(500), torch.randn(500) * 1e-5, torch.randn(500) * 1e4])
    n = len(values)
    # One row of ones times diag: the product is exactly `values` in float32, unless a factor is not finite.
    for dtype in (torch.bfloat16, torch.float16):
        finite = values[values.isfinite()]
        (out,), _ = kron_precondition([torch.ones(1, len(finite), dtype=dtype)], [torch.eye(1)], [torch.diag(finite)])
        assert torch.equal(out[0], finite.to(dtype))
        for value in values[~values.isfinite()]:
            (out,), _ = kron_precondition([torch.ones(1, 1, dtype=dtype)], [torch.eye(1)], [value.reshape(1, 1)])
            assert torch.equal(out[0], value.reshape(1).to(dtype)) or (out.isnan().all() and value.isnan())
    assert n == 1520


def test_deterministic_and_inputs_left_alone() -> None:
    layers = [make_layer(o, i, torch.float32, torch.float32) for o, i in [(300, 200), (64, 64), (10, 700)]]
    grads, left, right = (list(column) for column in zip(*layers, strict=True))
    copies = [[x.clone() for x in column] for column in (grads, left, right)]
    first, first_dots = kron_precondition(grads, left, right)
    for _ in range(3):
        out, dots = kron_precondition(grads, left, right)
        assert all(torch.equal(a, b) for a, b in zip(out, first, strict=True))
        assert torch.equal(dots, first_dots)
    for column, copied in zip((grads, left, right), copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(column, copied, strict=True))


def test_empty_list() -> None:
    out, dots = kron_precondition([], [], [])
    assert out == []
    assert dots.shape == (0,)


E2, E3 = torch.eye(2), torch.eye(3)
G = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("grads", "left", "right", "message"),
    [
        ([G], [], [E3], "left: expected 1 tensors, one for each of grads, got 0"),
        ([G], [E2], [E3, E3], "right: expected 1 tensors, one for each of grads, got 2"),
        ([G[0]], [E2], [E3], r"grads\[0\]: expected a 2-dimensional tensor \(out, in\), got shape \(3,\)"),
        (
            [G, G.mT],
            [E2, E2],
            [E3, E2],
            r"left\[1\]: expected shape \(3, 3\) for grads\[1\] of shape \(3, 2\), got \(2, 2\)",
        ),
        ([G], [E2], [E2], r"right\[0\]: expected shape \(3, 3\) for grads\[0\] of shape \(2, 3\), got \(2, 2\)"),
        ([G], [G], [E3], r"left\[0\]: expected a square matrix, got shape \(2, 3\)"),
        ([G.double()], [E2], [E3], r"grads\[0\]: expected .*bfloat16 or float16, got"),
        ([G.half()], [E2.double()], [E3.double()], r"grads\[0\]: expected .*left\[0\]"),
        ([G], [E2], [E3.double()], r"right\[0\]: expected .*left\[0\]"),
        ([G.int()], [E2], [E3], r"grads\[0\]: expected float32, float64, bfloat16 or float16, got"),
        ([G.cfloat()], [E2], [E3], r"grads\[0\]: expected float32, float64, bfloat16 or float16, got"),
        ([G.half()], [E2.half()], [E3.half()], r"left\[0\]: expected float32 or float64, got"),
    ],
)
def test_wrong_arguments_are_named(grads: list[Tensor], left: list[Tensor], right: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match="kronfac::kron_precondition: " + message):
        kron_precondition(grads, left, right)
    meta = [[x.to("meta") for x in column] for column in (grads, left, right)]
    with pytest.raises(RuntimeError, match="kronfac::kron_precondition: " + message):
        kron_precondition(*meta)


def double_layers(requires_grad: bool = True) -> list[Tensor]:
    shapes = [(2, 3), (2, 2), (3, 3), (4, 1), (4, 4), (1, 1)]
    return [torch.randn(*s, dtype=torch.float64, requires_grad=requires_grad) for s in shapes]


def both_layers(g0: Tensor, l0: Tensor, r0: Tensor, g1: Tensor, l1: Tensor, r1: Tensor) -> tuple[Tensor, ...]:
    out, dots = kron_precondition([g0, g1], [l0, l1], [r0, r1])
    return (*out, dots)


def test_gradients() -> None:
    inputs = double_layers()
    assert torch.autograd.gradcheck(both_layers, inputs)
    assert torch.autograd.gradgradcheck(both_layers, inputs)


def test_gradients_through_one_output_only() -> None:
    inputs = double_layers()
    assert torch.autograd.gradcheck(lambda *args: both_layers(*args)[0], inputs)
    assert torch.autograd.gradcheck(lambda *args: both_layers(*args)[-1], inputs)
    assert torch.autograd.gradgradcheck(lambda *args: both_layers(*args)[-1], inputs)


def test_gradients_with_narrow_grads_have_their_types() -> None:
    grad, left, right = make_layer(5, 6, torch.bfloat16, torch.float32)
    leaves = [x.requires_grad_() for x in (grad, left, right)]
    (out,), dots = kron_precondition([leaves[0]], [leaves[1]], [leaves[2]])
    (out.float().square().sum() + dots.sum()).backward()
    reference = [x.detach().double().requires_grad_() for x in leaves]
    (wide,), wide_dots = naive.kron_precondition([reference[0]], [reference[1]], [reference[2]])
    (wide.square().sum() + wide_dots.sum()).backward()
    for leaf, expected in zip(leaves, reference, strict=True):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - expected.grad).norm() <= 2e-2 * expected.grad.norm()


@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    op = torch.ops.kronfac.kron_precondition.default
    for layout in ("contiguous", "strided"):
        layers = [make_layer(o, i, *dtypes, layout) for o, i in [(3, 5), (4, 2), (0, 3)]]
        grads, left, right = (list(column) for column in zip(*layers, strict=True))
        torch.library.opcheck(op, (grads, left, right))
    torch.library.opcheck(op, ([x.requires_grad_() for x in grads], left, right))


def test_compiles_without_graph_breaks() -> None:
    def run(grads: list[Tensor], left: list[Tensor], right: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        out, dots = kron_precondition([g * 2 for g in grads], left, right)
        return [x + 1 for x in out], dots

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        layers = [make_layer(n, n + 1, torch.float32, torch.float32), make_layer(n, 3, torch.float32, torch.float32)]
        columns = [list(column) for column in zip(*layers, strict=True)]
        leaves = [x.requires_grad_() for x in columns[0]]
        out, dots = compiled(*columns)
        expected, expected_dots = run(*columns)
        torch.testing.assert_close((out, dots), (expected, expected_dots))
        grads = torch.autograd.grad(dots.sum() + out[0].sum(), leaves)
        wanted = torch.autograd.grad(expected_dots.sum() + expected[0].sum(), leaves)
        torch.testing.assert_close(grads, wanted)
