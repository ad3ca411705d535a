from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronfac.linalg.minres_recurrence import MinresRecurrence
from kronfac.linalg.newton_minres import newton_minres
from kronfac.linalg.solve import System
from tests.linalg.matrices import Counted, with_spectrum

Array = np.ndarray[Any, np.dtype[np.float64]]

ZERO = 1e-13  # of ‖H‖: what a curvature that is 0 by construction comes out as, with room
CLEAR = 1e-9  # what counts as certainly not 0


def iterates(H: Array, b: Array) -> Iterator[Array]:
    """The minimisers of ‖b - Hx‖ over growing Krylov spaces, by dense least squares."""
    scale = np.abs(np.linalg.eigvalsh(H)).max()
    basis = np.empty((len(b), 0))
    following = b / np.linalg.norm(b)
    yield np.zeros_like(b)
    for _ in range(len(b)):
        basis = np.column_stack([basis, following])
        coefficients = np.linalg.lstsq(H @ basis, b, rcond=1e-13)[0]
        yield basis @ coefficients
        following = H @ following
        for _ in range(3):
            following = following - basis @ (basis.T @ following)
        if np.linalg.norm(following) <= 1e-11 * scale:
            return
        following /= np.linalg.norm(following)


def dense(H: Array, g: Array, tolerance: float) -> tuple[str, Array, int]:
    """What the solver has to return, with the number of the residual; inputs on the verge are rejected."""
    scale = np.abs(np.linalg.eigvalsh(H)).max()
    number, x = 0, np.zeros_like(g)
    for number, x in enumerate(iterates(H, -g)):
        r = -g - H @ x
        if np.linalg.norm(r) <= 1e-11 * np.linalg.norm(g):
            break
        curvature = r @ H @ r / (r @ r)
        assume(abs(curvature) <= ZERO * scale or abs(curvature) >= CLEAR * scale)
        if curvature <= ZERO * scale:
            return "nonpositive", r, number
        change, target = np.linalg.norm(H @ r), tolerance * np.linalg.norm(H @ x)
        assume(abs(change - target) > 1e-3 * target or target == 0)
        if change <= target:
            break
    return "solution", x, number


KINDS = ("positive", "few", "consistent", "inconsistent", "indefinite", "barely", "negative", "singular indefinite")


def problem(kind: str, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """H and g of a kind."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(0.1, 3, size)
    zeros = max(1, size // 4)
    if kind == "few":
        values = generator.choice([0.2, 1.0, 2.5], size)
    elif kind in ("consistent", "inconsistent"):
        values[:zeros] = 0.0
    elif kind == "indefinite":
        values[: max(1, size // 3)] *= -1
    elif kind == "barely":
        values[0] = -1e-2
    elif kind == "negative":
        values *= -1
    elif kind == "singular indefinite":
        values[0], values[-1] = 0.0, -values[-1]
    H = with_spectrum(values, seed=seed)
    g = torch.tensor(generator.standard_normal(size))
    if kind == "consistent":
        g = H @ g
        g /= g.norm()
    return H, g


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(2, 20),
    st.integers(0, 10_000),
    st.sampled_from([1e-1, 1e-3, 1e-6]),
    st.booleans(),
)
def test_nonpositive_curvature_is_seen_exactly_when_the_dense_matrix_shows_it(
    kind: str, size: int, seed: int, tolerance: float, preconditioned: bool
) -> None:
    H, g = problem(kind, size, seed)
    preconditioner, root = None, np.eye(size)
    if preconditioned:
        generator = np.random.default_rng(seed + 1)
        scales = generator.uniform(0.5, 3, size)
        root = with_spectrum(scales, seed=seed + 1).numpy()
        preconditioner = torch.tensor(root @ root)
    inner = root @ H.numpy() @ root
    expected, direction, number = dense((inner + inner.T) / 2, root @ g.numpy(), tolerance)
    result = newton_minres(H, g, tolerance=tolerance, preconditioner=preconditioner, reorthogonalize=True)
    assert result.kind == expected
    if expected == "nonpositive":
        assert result.iterations == number + 1
        assert result.status == "nonpositive_curvature"
        assert result.curvature <= CLEAR * 30
    else:
        assert result.status == "converged"
    torch.testing.assert_close(result.direction, torch.tensor(root @ direction), rtol=1e-6, atol=1e-6)
    assert result.products == result.iterations
    if kind in ("positive", "few", "consistent"):  # rᵀHr > 0 for every residual, as they lie in the range of H
        assert result.kind == "solution"
    elif kind == "negative":
        assert (result.kind, result.iterations) == ("nonpositive", 1)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["positive", "indefinite", "barely", "negative"]),
    st.integers(2, 12),
    st.integers(0, 10_000),
)
def test_short_recurrences_see_the_same(kind: str, size: int, seed: int) -> None:
    H, g = problem(kind, size, seed)
    expected, direction, _ = dense(H.numpy(), g.numpy(), 1e-2)
    result = newton_minres(H, g, tolerance=1e-2)
    assert result.kind == expected
    torch.testing.assert_close(result.direction, torch.tensor(direction), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("capacity", [0, 30])
def test_what_the_recurrences_say_equals_explicit_products(preconditioned: bool, capacity: int) -> None:
    H, b = problem("indefinite", 30, 1)
    P = with_spectrum(np.linspace(0.3, 4, 30), seed=5) if preconditioned else torch.eye(30, dtype=torch.float64)
    system = System.check(H, b, 0.25, 1e-6, None, "test")
    state = MinresRecurrence(system, (lambda r: P @ r) if preconditioned else None, capacity)
    A = H + 0.25 * torch.eye(30, dtype=torch.float64)
    signs = set()
    for _ in range(12):
        state.look()
        r = b - A @ state.x
        length = float((r @ P @ r).sqrt())
        d = P @ r
        torch.testing.assert_close(state.direction, d, rtol=1e-9, atol=1e-9)
        assert state.residual == pytest.approx(length, rel=1e-9)
        assert state.curvature == pytest.approx(float(d @ A @ d) / length**2, rel=1e-7, abs=1e-9)
        assert state.change == pytest.approx(float((A @ d @ P @ (A @ d)).sqrt()), rel=1e-8)
        image = A @ state.x
        size = float((image @ P @ image).sqrt())
        if size:
            assert state.solves(1.001 * state.change / size)
            assert not state.solves(0.999 * state.change / size)
        else:
            assert not state.solves(1e30)
        signs.add(state.curvature > 0)
        assert state.take()
    assert signs == {True, False}
    assert system.products == 12


def test_directions_descend() -> None:
    for kind in KINDS:
        for seed in range(5):
            H, g = problem(kind, 15, seed)
            for limit in (1, 2, 4, None):
                result = newton_minres(H, g, tolerance=1e-2, max_iterations=limit)
                d = result.direction
                if limit == 1 and result.status == "iteration_limit":
                    assert result.kind == "solution"
                slope = float(g @ d)
                assert slope < 0
                if result.kind == "nonpositive":
                    assert float(d @ H @ d) <= 1e-9
                    assert slope == pytest.approx(-float(d @ d), rel=1e-6)
                    torch.testing.assert_close(result.residual, float(d.norm() / g.norm()), rtol=1e-6, atol=0)
                else:
                    assert 0 < float(d @ H @ d) <= -slope * (1 + 1e-9)


def test_a_large_ill_conditioned_matrix_without_its_basis() -> None:
    size = 150
    values = np.geomspace(1e-4, 1, size)
    g = torch.tensor(np.random.default_rng(0).standard_normal(size))
    positive = newton_minres(with_spectrum(values), g, tolerance=1e-4, max_iterations=4000)
    assert (positive.kind, positive.status) == ("solution", "converged")
    values[0] = -0.3
    H = with_spectrum(values)
    negative = newton_minres(H, g, tolerance=1e-8)
    assert negative.kind == "nonpositive"
    assert float(negative.direction @ H @ negative.direction) < 0


def test_a_preconditioner_saves_products() -> None:
    scales = np.geomspace(1e-2, 1e2, 40)
    root = torch.diag(torch.tensor(np.sqrt(scales)))
    H = root @ with_spectrum(np.linspace(1, 2, 40)) @ root
    H = (H + H.mT) / 2
    g = torch.tensor(np.random.default_rng(3).standard_normal(40))
    plain = newton_minres(H, g, tolerance=1e-6)
    helped = newton_minres(H, g, tolerance=1e-6, preconditioner=lambda r: r / torch.tensor(scales))
    assert helped.products < plain.products / 2
    torch.testing.assert_close(H @ helped.direction, -g, rtol=0, atol=1e-3)
    shifted = newton_minres(
        H, g, shift=0.5, tolerance=1e-9, preconditioner=torch.diag(torch.tensor(1 / (scales + 0.5)))
    )
    torch.testing.assert_close(
        shifted.direction, -torch.linalg.solve(H + 0.5 * torch.eye(40, dtype=torch.float64), g), rtol=1e-5, atol=1e-7
    )


def test_small_and_special_systems() -> None:
    zero = newton_minres(torch.eye(3), torch.zeros(3))
    assert (zero.kind, zero.status, zero.products) == ("solution", "converged", 0)
    assert zero.direction.count_nonzero() == 0
    for value, kind, expected in ((4.0, "solution", -0.5), (-4.0, "nonpositive", -2.0), (0.0, "nonpositive", -2.0)):
        result = newton_minres(torch.tensor([[value]]), torch.tensor([2.0]))
        assert (result.kind, result.products) == (kind, 1)
        assert float(result.direction) == pytest.approx(expected)
    H, g = problem("positive", 25, 2)
    single = newton_minres(H.float(), g.float(), tolerance=1e-3)
    assert single.kind == "solution"
    torch.testing.assert_close(single.direction.double(), -torch.linalg.solve(H, g), rtol=1e-2, atol=1e-2)
    # squares of such a gradient vanish in float32
    tiny = newton_minres(H.float(), g.float() * 1e-30, tolerance=1e-3, preconditioner=lambda r: 2 * r)
    torch.testing.assert_close(tiny.direction.double() * 1e30, -torch.linalg.solve(H, g), rtol=1e-2, atol=1e-2)


def test_every_product_is_counted() -> None:
    H, g = problem("indefinite", 20, 4)
    operator = Counted(H)
    seen: list[tuple[int, float]] = []
    result = newton_minres(operator, g, progress=lambda done, size: seen.append((done, size)))
    assert operator.products == result.products
    assert [done for done, _ in seen] == list(range(1, result.iterations))
    assert [size for _, size in seen] == sorted((size for _, size in seen), reverse=True)
    assert result.residual == seen[-1][1] if seen else 1.0


def test_refusals() -> None:
    H, g = problem("positive", 6, 0)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"gradient": g[:3]}, ValueError, r"newton_minres: gradient: expected shape \(6,\)"),
        ({"gradient": g.float()}, TypeError, "gradient: expected torch.float64"),
        ({"gradient": g * float("inf")}, ValueError, "gradient: expected finite values"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a finite number greater than 0"),
        ({"shift": float("nan")}, ValueError, "shift: expected a finite number"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected at least 1"),
        ({"preconditioner": 3}, TypeError, "preconditioner: expected an operator"),
        ({"preconditioner": lambda r: -r}, ValueError, "expected a positive definite one"),
        ({"preconditioner": lambda r: r[:2]}, ValueError, "preconditioner: expected a finite tensor of shape"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            newton_minres(H, **{"gradient": g, **options})
    # indefinite in a direction that b does not see at first
    sign = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    start = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.2], dtype=torch.float64)
    with pytest.raises(ValueError, match="expected a positive definite one"):
        newton_minres(H + 3 * torch.eye(6), start, tolerance=1e-12, preconditioner=sign)
