"""kronfac::eigen_precondition against the float64 definition and against the dense damped inverse."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from kronfac.ops import damped_eigh, eigen_precondition, naive

# dtype of the gradient, of the bases
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def relayout(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.full((2 * x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)[::2, ::3].copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def orthogonal(n: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q.to(dtype)


def make_layer(o: int, i: int, grad: torch.dtype, basis: torch.dtype, layout: str = "contiguous") -> Layer:
    values = (
        torch.randn(o, i).to(grad),
        orthogonal(o, basis),
        orthogonal(i, basis),
        torch.rand(o, i, dtype=basis),
    )
    a, b, c, d = (relayout(x, layout) for x in values)
    return a, b, c, d


def columns_of(layers: list[Layer]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*layers, strict=True)]


def assert_like_the_definition(layers: list[Layer], damping: Tensor) -> None:
    columns = columns_of(layers)
    out, dots = eigen_precondition(*columns, damping)
    expected, expected_dots = naive.eigen_precondition(*[[x.double() for x in c] for c in columns], damping.double())
    assert dots.dtype == damping.dtype
    assert dots.shape == (len(layers),)
    for i, (grad, left, right, spectrum) in enumerate(layers):
        assert out[i].dtype == grad.dtype
        assert out[i].shape == grad.shape
        assert out[i].is_contiguous()
        if grad.numel() == 0:
            assert dots[i] == 0
            continue
        shift = float(damping.expand(len(layers))[i])
        left, right, wide = left.double().abs(), right.double().abs(), grad.double().abs()
        inside = (left.mT @ wide @ right) / (spectrum.double() + shift)
        bound = left @ inside @ right.mT  # every partial sum stays below it
        eps = torch.finfo(damping.dtype).eps
        error = (out[i].double() - expected[i]).abs()
        assert bool((error <= 4 * eps * bound + torch.finfo(grad.dtype).eps * expected[i].abs() + 1e-7).all())
        assert abs(float(dots[i]) - float(expected_dots[i])) <= 4 * eps * float((bound * wide).sum())


@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=6),
    dtypes=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_ragged_lists_of_any_layout(
    shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, torch.dtype], layout: str, shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    damping = torch.rand(() if shared else (len(shapes),), dtype=dtypes[1]) + 0.1
    assert_like_the_definition([make_layer(o, i, *dtypes, layout) for o, i in shapes], damping)


# Large enough to be cut into slices, which need two rounds; beside a layer that is finished in one.
@pytest.mark.parametrize("shape", [(40, 500), (500, 40), (301, 300), (1, 700)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_sliced_layers(shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    layers = [make_layer(*shape, *dtypes), make_layer(7, 5, *dtypes)]
    assert_like_the_definition(layers, torch.tensor([0.1, 0.5], dtype=dtypes[1]))


def test_layers_may_mix_gradient_types() -> None:
    layers = [make_layer(20, 30, grad, torch.float32) for grad, basis in DTYPES if basis == torch.float32]
    assert_like_the_definition(layers, torch.tensor(0.2))


def test_equals_the_dense_damped_inverse() -> None:
    o, i, damping = 6, 5, 0.03
    x, g = torch.randn(40, i, dtype=torch.float64), torch.randn(40, o, dtype=torch.float64)
    a, b = x.mT @ x / 40, g.mT @ g / 40
    (la, lb), (qa, qb), info = damped_eigh([a, b], torch.tensor(0.0, dtype=torch.float64))
    assert info.tolist() == [0, 0]
    grad = torch.randn(o, i, dtype=torch.float64)
    (out,), dots = eigen_precondition([grad], [qb], [qa], [torch.outer(lb, la)], torch.tensor([damping]).double())
    # Row-major vec: (B (x) A) vec(V) = vec(B V A).
    dense = torch.kron(b, a) + float(torch.tensor([damping]).double()) * torch.eye(o * i, dtype=torch.float64)
    expected = torch.linalg.solve(dense, grad.reshape(-1)).reshape(o, i)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dots[0], (expected * grad).sum(), rtol=1e-10, atol=1e-10)


def test_strided_damping_and_division_by_zero() -> None:
    eye = torch.eye(2)
    out, dots = eigen_precondition(
        [torch.ones(2, 2)] * 2, [eye] * 2, [eye] * 2, [torch.zeros(2, 2)] * 2, torch.tensor([2.0, 9.0, 0.0])[::2]
    )
    assert torch.equal(out[0], torch.full((2, 2), 0.5))
    assert dots[0] == 2
    assert not out[1].isfinite().any()


def test_deterministic_and_inputs_left_alone() -> None:
    layers = [make_layer(o, i, torch.float32, torch.float32) for o, i in [(300, 200), (64, 64), (10, 500)]]
    columns, damping = columns_of(layers), torch.tensor(0.1)
    copies = [[x.clone() for x in column] for column in columns]
    first, first_dots = eigen_precondition(*columns, damping)
    for _ in range(3):
        out, dots = eigen_precondition(*columns, damping)
        assert all(torch.equal(a, b) for a, b in zip(out, first, strict=True))
        assert torch.equal(dots, first_dots)
    for column, copied in zip(columns, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(column, copied, strict=True))


def test_empty_list() -> None:
    out, dots = eigen_precondition([], [], [], [], torch.tensor(0.1, dtype=torch.float64))
    assert out == []
    assert dots.shape == (0,)
    assert dots.dtype == torch.float64


E2, E3, G, D = torch.eye(2), torch.eye(3), torch.ones(2, 3), torch.tensor(0.1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([G], [], [E3], [G], D), "left_vectors: expected 1 tensors, one for each of grads, got 0"),
        (([G], [E2], [E3, E3], [G], D), "right_vectors: expected 1 tensors, one for each of grads, got 2"),
        (([G], [E2], [E3], [], D), "eigenvalues: expected 1 tensors, one for each of grads, got 0"),
        (([G[0]], [E2], [E3], [G], D), r"grads\[0\]: expected a 2-dimensional tensor \(out, in\), got shape \(3,\)"),
        (([G], [E3], [E3], [G], D), r"left_vectors\[0\]: expected shape \(2, 2\) for grads\[0\] of shape \(2, 3\)"),
        (([G], [E2], [G], [G], D), r"right_vectors\[0\]: expected a square matrix, got shape \(2, 3\)"),
        (([G], [E2], [E3], [G.mT], D), r"eigenvalues\[0\]: expected the shape of grads\[0\] \(2, 3\), got \(3, 2\)"),
        (
            ([G], [E2], [E3], [G[0]], D),
            r"eigenvalues\[0\]: expected a 2-dimensional tensor \(out, in\), got shape \(3,\)",
        ),
        (([G], [E2], [E3], [G.double()], D), r"eigenvalues\[0\]: expected .*the type of damping"),
        (([G], [E2], [E3], [G], D.double()), r"left_vectors\[0\]: expected .*the type of damping"),
        (([G.double()], [E2], [E3], [G], D), r"grads\[0\]: expected .*bfloat16 or float16, got"),
        (([G.int()], [E2], [E3], [G], D), r"grads\[0\]: expected float32, float64, bfloat16 or float16, got"),
        (([G], [E2], [E3], [G], D.half()), "damping: expected float32 or float64, got"),
        (
            ([G], [E2], [E3], [G], D.expand(2)),
            r"damping: expected shape \(1,\), one value for each matrix, or \(\), got \(2,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(args: tuple[list[Tensor], ...], message: str) -> None:
    with pytest.raises(RuntimeError, match="kronfac::eigen_precondition: " + message):
        eigen_precondition(*args)  # type: ignore[arg-type]
    meta = [[x.to("meta") for x in column] for column in args[:4]]
    with pytest.raises(RuntimeError, match="kronfac::eigen_precondition: " + message):
        eigen_precondition(*meta, args[4].to("meta"))  # type: ignore[arg-type,attr-defined]


@pytest.mark.cpu_only("on a GPU nobody waits for the device: the result is NaN")
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_bad_damping_is_refused(value: float) -> None:
    with pytest.raises(RuntimeError, match="kronfac::eigen_precondition: damping: expected finite values >= 0, got"):
        eigen_precondition([G], [E2], [E3], [G], torch.tensor(value))


SHAPES = [(2, 3), (2, 2), (3, 3), (3, 1), (3, 3), (1, 1)]


def double_inputs(shared: bool) -> list[Tensor]:
    leaves = [torch.randn(*s, dtype=torch.float64) for s in SHAPES]
    leaves += [torch.rand(*SHAPES[0], dtype=torch.float64) + 0.5, torch.rand(*SHAPES[3], dtype=torch.float64) + 0.5]
    leaves.append(torch.rand(() if shared else (2,), dtype=torch.float64) + 0.5)
    return [x.requires_grad_() for x in leaves]


def both_layers(*x: Tensor) -> tuple[Tensor, ...]:
    out, dots = eigen_precondition([x[0], x[3]], [x[1], x[4]], [x[2], x[5]], [x[6], x[7]], x[8])
    return (*out, dots)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients(shared: bool) -> None:
    inputs = double_inputs(shared)
    assert torch.autograd.gradcheck(both_layers, inputs)
    assert torch.autograd.gradgradcheck(both_layers, inputs)


@pytest.mark.parametrize("output", [0, 2])
def test_gradients_through_one_output_only(output: int) -> None:
    inputs = double_inputs(shared=True)
    assert torch.autograd.gradcheck(lambda *args: both_layers(*args)[output], inputs)
    assert torch.autograd.gradgradcheck(lambda *args: both_layers(*args)[output], inputs)


def test_gradients_with_narrow_grads_have_their_types() -> None:
    leaves = [x.requires_grad_() for x in make_layer(5, 6, torch.bfloat16, torch.float32)]
    (out,), dots = eigen_precondition(*[[x] for x in leaves], torch.tensor(0.1))
    (out.float().square().sum() + dots.sum()).backward()
    reference = [x.detach().double().requires_grad_() for x in leaves]
    (wide,), wide_dots = naive.eigen_precondition(*[[x] for x in reference], torch.tensor(0.1).double())
    (wide.square().sum() + wide_dots.sum()).backward()
    for leaf, expected in zip(leaves, reference, strict=True):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - expected.grad).norm() <= 2e-2 * expected.grad.norm()


@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    op = torch.ops.kronfac.eigen_precondition.default
    damping = torch.tensor(0.1, dtype=dtypes[1])
    for layout in ("contiguous", "strided"):
        columns = columns_of([make_layer(o, i, *dtypes, layout) for o, i in [(3, 5), (4, 2), (0, 3)]])
        torch.library.opcheck(op, (*columns, damping))
    torch.library.opcheck(op, ([x.requires_grad_() for x in columns[0]], *columns[1:], damping))


def test_compiles_without_graph_breaks() -> None:
    def run(grads: list[Tensor], *rest: object) -> tuple[list[Tensor], Tensor]:
        out, dots = eigen_precondition([g * 2 for g in grads], *rest)  # type: ignore[arg-type]
        return [x + 1 for x in out], dots

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        layers = [make_layer(n, n + 1, torch.float32, torch.float32), make_layer(n, 3, torch.float32, torch.float32)]
        columns, damping = columns_of(layers), torch.tensor([0.1, 0.2])
        leaves = [x.requires_grad_() for x in columns[0]]
        out, dots = compiled(*columns, damping)
        expected, expected_dots = run(*columns, damping)
        torch.testing.assert_close((out, dots), (expected, expected_dots))
        grads = torch.autograd.grad(dots.sum() + out[0].sum(), leaves)
        wanted = torch.autograd.grad(expected_dots.sum() + expected[0].sum(), leaves)
        torch.testing.assert_close(grads, wanted)
