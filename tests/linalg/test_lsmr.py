"""LSMR against scipy's iteration for iteration, dense least squares, and Jacobians of networks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import lsmr as scipy_lsmr
from torch import Tensor
from torch.func import functional_call, jvp, vjp
from torch.nn import functional

from kronfac.linalg import MatrixFree, cg, lsmr
from kronfac.operators import ggn, hessian
from tests.linalg.matrices import Counted
from tests.operators.cases import make_case


def matrix(m: int, n: int, seed: int = 0, condition: float = 100.0, rank: int | None = None) -> Tensor:
    """Random singular vectors, singular values from 1 down to 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    count = min(m, n) if rank is None else rank
    left = torch.linalg.qr(torch.randn(m, count, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, count, dtype=torch.float64, generator=generator))[0]
    return (left * torch.logspace(0, -float(np.log10(condition)), count, dtype=torch.float64)) @ right.mT


def right_side(m: int, seed: int = 1) -> Tensor:
    return torch.randn(m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def least_squares(A: Tensor, b: Tensor, damping: float = 0.0) -> Tensor:
    """By LAPACK: the shortest minimiser."""
    n = A.shape[1]
    if damping:
        A = torch.cat([A, damping**0.5 * torch.eye(n, dtype=A.dtype)])
        b = torch.cat([b, b.new_zeros(n)])
    return torch.from_numpy(np.linalg.lstsq(A.numpy(), b.numpy(), rcond=1e-12)[0])


@pytest.mark.parametrize("damping", [0.0, 0.04])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_scipy_iteration_for_iteration(shape: tuple[int, int], damping: float) -> None:
    A, b = matrix(*shape), right_side(shape[0])
    for steps in range(1, 11):
        expected = scipy_lsmr(A.numpy(), b.numpy(), damp=damping**0.5, atol=0, btol=0, conlim=0, maxiter=steps)
        x, _, iterations, residual, gradient, size, condition, _ = expected
        got = lsmr(A, b, damping=damping, tolerance=1e-15, max_iterations=steps)
        assert (got.iterations, got.status) == (iterations, "iteration_limit")
        torch.testing.assert_close(got.x, torch.from_numpy(x), rtol=1e-7, atol=1e-9)
        assert got.norm == pytest.approx(size, rel=1e-8)
        assert got.condition == pytest.approx(condition, rel=1e-7)
        # scipy's norms are those of its recurrences, ours are measured
        whole = np.hypot(float((b - A @ got.x).norm()), damping**0.5 * float(got.x.norm()))
        assert whole == pytest.approx(residual, rel=1e-7)
        assert got.residual == pytest.approx(float((b - A @ got.x).norm() / b.norm()), rel=1e-12)
        assert got.gradient * got.norm * whole == pytest.approx(gradient, rel=1e-6)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize(("shape", "rank"), [((40, 15), None), ((15, 40), None), ((30, 25), 12)])
def test_dense_least_squares(shape: tuple[int, int], rank: int | None, damping: float) -> None:
    A, b = matrix(*shape, rank=rank), right_side(shape[0])
    seen: list[tuple[int, float]] = []
    result = lsmr(A, b, damping=damping, tolerance=1e-10, progress=lambda done, size: seen.append((done, size)))
    assert result.converged
    assert result.status == ("consistent" if shape == (15, 40) and not damping else "least_squares")
    torch.testing.assert_close(result.x, least_squares(A, b, damping), rtol=1e-6, atol=1e-7)
    assert [done for done, _ in seen] == list(range(1, result.iterations + 1))
    assert result.products >= 2 * result.iterations


def test_the_gradient_falls_at_every_step() -> None:
    A, b = matrix(60, 40, condition=1e4), right_side(60)
    gradients = []
    for steps in range(1, 30):
        x = lsmr(A, b, tolerance=1e-15, max_iterations=steps).x
        gradients.append(float((A.mT @ (b - A @ x)).norm()))
    assert all(after <= before * (1 + 1e-10) for before, after in pairwise(gradients))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 25),
    st.integers(1, 25),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 1e-4, 1.0]),
    st.booleans(),
)
def test_what_is_called_converged_is_a_minimum(m: int, n: int, seed: int, damping: float, deficient: bool) -> None:
    A = matrix(m, n, seed, condition=30.0, rank=max(1, min(m, n) // 2) if deficient else None)
    b = right_side(m, seed + 1)
    result = lsmr(A, b, damping=damping, tolerance=1e-9)
    assert result.converged
    expected = least_squares(A, b, damping)
    torch.testing.assert_close(result.x, expected, rtol=1e-4, atol=1e-5)
    best = float((b - A @ expected).square().sum() + damping * expected.square().sum())
    found = float((b - A @ result.x).square().sum() + damping * result.x.square().sum())
    assert found <= best + 1e-9 * float(b.square().sum())


def test_statuses() -> None:
    A, b = matrix(30, 20, condition=1e6), right_side(30)
    assert lsmr(A, b, max_iterations=3).status == "iteration_limit"
    limited = lsmr(A, b, tolerance=1e-14, condition_limit=100.0, max_iterations=1000)
    assert limited.status == "ill_conditioned"
    assert limited.condition >= 100
    impossible = lsmr(A.float(), b.float(), tolerance=1e-12, max_iterations=1000)
    assert not impossible.converged
    assert impossible.status in ("stagnated", "ill_conditioned")
    zero = lsmr(A, torch.zeros(30, dtype=torch.float64))
    assert (zero.status, zero.residual, zero.iterations) == ("consistent", 0.0, 0)
    assert zero.x.count_nonzero() == 0
    outside = torch.linalg.qr(A, mode="complete")[0][:, -1]  # orthogonal to the range, up to rounding
    nothing = lsmr(A, outside)
    assert nothing.status == "least_squares"
    assert float(nothing.x.norm()) < 1e-8
    assert nothing.residual == pytest.approx(1.0)
    exact = torch.zeros(3, 2)
    exact[0, 0] = 2.0
    shortest = lsmr(exact, torch.tensor([4.0, 0.0, 0.0]))
    torch.testing.assert_close(shortest.x, torch.tensor([2.0, 0.0]))
    assert shortest.status == "consistent"
    assert lsmr(exact, torch.tensor([0.0, 0.0, 1.0])).status == "least_squares"


def test_single_precision() -> None:
    A, b = matrix(50, 30, condition=5.0), right_side(50)
    result = lsmr(A.float(), b.float(), tolerance=1e-6)
    assert result.converged
    assert result.x.dtype == torch.float32
    torch.testing.assert_close(result.x.double(), least_squares(A, b), rtol=1e-3, atol=1e-3)


def test_forms_of_operators() -> None:
    A, b = matrix(12, 9), right_side(12)
    expected = least_squares(A, b)

    class WithAdjoint(Counted):
        def rmatvec(self, u: Tensor) -> Tensor:
            return self.matrix.mT @ u

    dense = A.numpy()
    free = MatrixFree((12, 9), lambda v: A @ v, lambda u: A.mT @ u, dtype=torch.float64)
    operators: list[Any] = [
        dense,
        sparse.csr_matrix(dense),
        sparse.coo_array(dense),
        LinearOperator((12, 9), matvec=lambda v: dense @ v, rmatvec=lambda u: dense.T @ u, dtype=np.float64),
        WithAdjoint(A),
        free,
        free.mT.mT,
        A.to_sparse(),
    ]
    for operator in operators:
        result = lsmr(operator, b, tolerance=1e-12)
        torch.testing.assert_close(result.x, expected, rtol=1e-8, atol=1e-8)
    whole = lsmr(sparse.csr_matrix(np.array([[3, 0], [0, 2]])), torch.tensor([3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(whole.x, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_products_of_curvature_operators() -> None:
    case = make_case("mlp")
    data = (case.inputs, case.targets)
    H, G = hessian(case.model, case.loss_fn, data), ggn(case.model, case.loss_fn, data)
    product = H.shift(0.5) @ G.shift(0.5)
    b = right_side(product.shape[0])
    result = lsmr(product, b, tolerance=1e-11, max_iterations=400)
    assert result.status == "consistent"
    torch.testing.assert_close(product.to_dense() @ result.x, b, rtol=0, atol=1e-8)


def test_gauss_newton_step_from_the_jacobian() -> None:
    """‖r - J x‖² + λ‖x‖² has the minimum of the damped Gauss-Newton system of the squared error."""
    case = make_case("regression")
    names = [name for name, _ in case.model.named_parameters()]
    shapes = [p.shape for p in case.model.parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in case.model.parameters()])

    def outputs(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(case.model, values, (case.inputs,)).reshape(-1)

    pull = vjp(outputs, start)[1]
    J = MatrixFree(
        (case.targets.numel(), len(start)),
        lambda v: jvp(outputs, (start,), (v,))[1],
        lambda u: pull(u)[0],
        dtype=torch.float64,
    )
    r = case.targets.reshape(-1) - outputs(start)
    step = lsmr(J, r, damping=0.1, tolerance=1e-11)
    operator = ggn(case.model, functional.mse_loss, (case.inputs, case.targets))
    half = case.targets.numel() / 2
    same = cg(operator, pull(r)[0] / half, shift=0.1 / half, tolerance=1e-10)
    torch.testing.assert_close(step.x, same.x, rtol=1e-6, atol=1e-8)


def test_a_wrong_transpose_is_refused() -> None:
    A, b = matrix(20, 20), right_side(20)
    wrong = [lambda u: A @ u, lambda u: -(A.mT @ u), lambda u: 2 * (A.mT @ u), lambda u: A.mT @ u.roll(1)]
    for rmatvec in wrong:
        operator = MatrixFree((20, 20), lambda v: A @ v, rmatvec, dtype=torch.float64)
        with pytest.raises(ValueError, match="the transpose is not that of the operator"):
            lsmr(operator, b, tolerance=1e-10)


def test_refusals() -> None:
    A, b = matrix(6, 4), right_side(6)
    nan = A.clone()
    nan[0, 0] = float("nan")
    short = MatrixFree((6, 4), lambda v: v, lambda u: A.mT @ u, dtype=torch.float64)
    infinite = MatrixFree((6, 4), lambda v: (A @ v) / 0, lambda u: A.mT @ u, dtype=torch.float64)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (3, {}, TypeError, "op: expected an operator with `shape`, `@` and `mT`"),
        (Counted(A), {}, TypeError, "op: Counted has products but no transpose: expected `rmatvec"),
        (A[0], {}, ValueError, r"op: expected shape \(m, n\) with m, n >= 1, got \(4,\)"),
        (A[:, :0], {}, ValueError, "m, n >= 1"),
        (A.to(torch.complex128), {}, TypeError, "real floating-point torch type, got torch.complex128"),
        (A.numpy().astype(complex), {}, TypeError, "real floating-point"),
        (nan, {}, ValueError, "the matrix contains NaN"),
        (short, {}, ValueError, r"op @ v: expected a tensor of shape \(6,\), got \(4,\)"),
        (infinite, {}, ValueError, "op @ v is not finite"),
        (A, {"b": b.numpy()}, TypeError, "b: expected a tensor, got ndarray"),
        (A, {"b": b.float()}, TypeError, "b: expected torch.float64, got torch.float32"),
        (A, {"b": b[:4]}, ValueError, r"b: expected shape \(6,\) on cpu, got \(4,\)"),
        (A, {"b": b * float("inf")}, ValueError, "b: expected finite values"),
        (A, {"damping": -1.0}, ValueError, "damping: expected a finite number of at least 0, got -1.0"),
        (A, {"damping": True}, TypeError, "damping: expected a number, got True"),
        (A, {"tolerance": 0}, ValueError, "tolerance: expected a finite number greater than 0"),
        (A, {"condition_limit": 0.5}, ValueError, "condition_limit: expected a finite number of at least 1"),
        (A, {"max_iterations": 0}, ValueError, "max_iterations: expected at least 1"),
        (A, {"max_iterations": 2.0}, TypeError, "max_iterations: expected an integer"),
    ]
    for operator, options, error, match in cases:
        arguments = {"b": b, **options}
        with pytest.raises(error, match=f"^kronfac.linalg.lsmr: .*{match}|^kronfac.linalg.lsmr: {match}"):
            lsmr(operator, **arguments)
