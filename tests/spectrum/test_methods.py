"""Every method for eigenpairs against LAPACK, on spectra that are easy to get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronfac.operators import ggn, hessian, kfac
from kronfac.spectrum import eigsh
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import dense_hessian, make_case
from tests.spectrum.eigenpairs import ORDERS, SPECTRA, check, wanted

OTHERS = ("block_lanczos", "lobpcg")  # test_eigsh.py has the default
# What takes thousands of products: the small end of what decays without a preconditioner, and powers of equal values.
SLOW = {
    "lobpcg": {("decaying", "smallest"), ("network", "smallest"), ("decaying", "both")},
    "power": {("gaussian", "magnitude"), ("negative", "magnitude"), ("tiny", "magnitude"), ("huge", "magnitude")},
}


@pytest.mark.parametrize("method", [*OTHERS, "power"])
@pytest.mark.parametrize("which", ORDERS)
@pytest.mark.parametrize("name", SPECTRA)
def test_equals_numpy(name: str, which: str, method: str) -> None:
    if (name, which) in SLOW.get(method, ()) or (method == "power" and which != "magnitude"):
        return
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    for k in sorted({1, min(7, len(values))}):
        result = eigsh(matrix, k, which, method=method, tol=1e-7, multiplicity=True)
        check(result, matrix, k, which, 1e-8)
        assert result.status == ["converged"] * k


@pytest.mark.parametrize("method", [*OTHERS, "power"])
@pytest.mark.parametrize("name", ["repeated", "low_rank", "network", "identity", "plus_minus"])
def test_float32(name: str, method: str) -> None:
    matrix = with_spectrum(SPECTRA[name], dtype=torch.float32)
    result = eigsh(matrix, min(7, len(matrix)), "magnitude", method=method, multiplicity=True)
    assert result.values.dtype == torch.float32
    check(result, matrix, min(7, len(matrix)), "magnitude", 3e-6)


@given(
    size=st.integers(1, 50),
    distinct=st.integers(1, 50),
    k=st.integers(1, 8),
    more=st.integers(0, 5),
    which=st.sampled_from(ORDERS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10_000),
)
def test_lobpcg_on_any_multiplicities(
    size: int, distinct: int, k: int, more: int, which: str, dtype: torch.dtype, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.choice(generator.standard_normal(distinct), size)
    matrix = with_spectrum(values, seed, dtype)
    k = min(k, size)
    block = min(size, k + more)
    result = eigsh(matrix, k, which, method="lobpcg", block_size=block, max_products=20_000, seed=seed)
    exact = wanted(np.linalg.eigvalsh(matrix.double().numpy()), k, which)
    found = result.values.double().numpy()
    assert result.converged.all()
    assert result.ended == "finished"
    if which == "magnitude":
        exact, found = np.abs(exact), np.abs(found)
    np.testing.assert_allclose(found, exact, atol=2e-5 * np.abs(values).max())


@given(
    values=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=30),
    k=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_power_iteration_on_any_signs_and_multiplicities(values: list[float], k: int, seed: int) -> None:
    matrix = with_spectrum(values, seed)
    k = min(k, len(values))
    result = eigsh(matrix, k, method="power", tol=1e-6, seed=seed)
    exact = wanted(np.linalg.eigvalsh(matrix.numpy()), k, "magnitude")
    assert result.converged.all()
    np.testing.assert_allclose(np.abs(result.values.numpy()), np.abs(exact), atol=1e-5)


def _ill_conditioned() -> tuple[torch.Tensor, torch.Tensor]:
    """Six decades with a weak coupling, and the inverse of its diagonal."""
    diagonal = torch.logspace(-3, 3, 120, dtype=torch.float64)
    noise = with_spectrum(np.linspace(-1, 1, 120)) * 0.05
    roots = diagonal.sqrt()
    return torch.diag(diagonal) + roots[:, None] * noise * roots, 1 / diagonal


def test_a_preconditioner_speeds_lobpcg_up() -> None:
    matrix, inverse = _ill_conditioned()

    class Jacobi:
        shape = tuple(matrix.shape)

        def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
            return columns * inverse[:, None]

    options: dict[str, Any] = {"method": "lobpcg", "tol": 1e-11, "max_products": 600}
    exact = np.linalg.eigvalsh(matrix.numpy())[:4]
    plain = eigsh(matrix, 4, "smallest", **options)
    assert plain.status == ["limit"] * 4
    for preconditioner in (Jacobi(), torch.diag(inverse), lambda columns: columns * inverse[:, None]):
        result = eigsh(matrix, 4, "smallest", preconditioner=preconditioner, **options)
        assert result.status == ["converged"] * 4
        assert result.products < 200
        # Residuals of 1e-8 bound the error, which is of the order of their square over the gap.
        np.testing.assert_allclose(result.values.numpy(), exact, rtol=1e-8)


def test_a_kfac_inverse_as_preconditioner() -> None:
    case = make_case("regression", torch.float64)
    data = (case.inputs, case.targets)
    damped = ggn(case.model, case.loss_fn, data).shift(0.1)
    inverse = kfac(case.model, "gaussian", data, kind="exact").inverse(0.1)
    result = eigsh(damped, 3, "smallest", method="lobpcg", preconditioner=inverse, tol=1e-8)
    check(result, damped.to_dense(), 3, "smallest", 1e-9)


def test_lobpcg_at_the_limit_of_round_off() -> None:
    """Where residuals are round-off, a basis of X, residuals and steps as they come is singular."""
    matrix = with_spectrum(np.concatenate([[4.0, 4.0, 3.0], np.logspace(0, -12, 97)]))
    result = eigsh(matrix, 6, "largest", method="lobpcg", tol=1e-16, max_products=3000)
    exact = np.linalg.eigvalsh(matrix.numpy())[::-1][:6]
    np.testing.assert_allclose(result.values.numpy(), exact, atol=1e-14)
    assert float(result.residuals.max()) < 1e-14
    assert set(result.status) <= {"converged", "stagnated"}


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_equals_scipy(which: str) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix, inverse = _ill_conditioned()
    array = matrix.numpy()
    # ARPACK needs an inverse to reach the small end.
    how = {"which": "LA"} if which == "largest" else {"which": "LM", "sigma": 0.0}
    arpack = np.sort(linalg.eigsh(array, 5, tol=1e-12, **how)[0])
    for method in ("lanczos", *OTHERS):
        if method == "lobpcg" and which == "smallest":
            continue
        ours = eigsh(matrix, 5, which, method=method, tol=1e-11, max_products=5000)
        assert ours.converged.all()
        np.testing.assert_allclose(np.sort(ours.values.numpy()), arpack, rtol=1e-7)
    start = np.random.default_rng(0).standard_normal((120, 8))
    options = {"M": np.diag(inverse.numpy())} if which == "smallest" else {}
    theirs = linalg.lobpcg(array, start, largest=which == "largest", tol=1e-8, maxiter=200, **options)[0]
    options = {"preconditioner": torch.diag(inverse)} if which == "smallest" else {}
    ours = eigsh(matrix, 5, which, method="lobpcg", block_size=8, tol=1e-11, **options)
    chosen = np.sort(theirs)[-5:] if which == "largest" else np.sort(theirs)[:5]
    np.testing.assert_allclose(np.sort(ours.values.numpy()), chosen, rtol=1e-7)


def test_both_ends_equal_scipy() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix = with_spectrum(SPECTRA["gaussian"])
    for k in (4, 5):
        theirs = np.sort(linalg.eigsh(matrix.numpy(), k, which="BE", tol=1e-12)[0])
        np.testing.assert_allclose(eigsh(matrix, k, "both", tol=1e-7).values.numpy(), theirs[::-1], atol=1e-9)


@given(
    size=st.integers(1, 60),
    distinct=st.integers(1, 60),
    share=st.floats(0, 1),
    which=st.sampled_from(ORDERS),
    block=st.integers(1, 6),
    room=st.sampled_from([None, 0, 5]),
    seed=st.integers(0, 10_000),
)
def test_any_multiplicities_blocks_and_storage(
    size: int, distinct: int, share: float, which: str, block: int, room: int | None, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.choice(generator.standard_normal(distinct), size)
    matrix = with_spectrum(values, seed)
    k, block = max(1, round(share * size)), min(block, size)
    basis_size = None if room is None else min(size, k + 2 * block + 2) + room
    options: dict[str, Any] = {"block_size": block, "basis_size": basis_size, "max_products": 20_000}
    result = eigsh(matrix, k, which, method="block_lanczos", tol=1e-7, multiplicity=True, seed=seed, **options)
    # Beyond 1 % of the spectrum's width no eigenvalue may be missed; within, a neighbour may stand in.
    exact = wanted(np.linalg.eigvalsh(matrix.numpy()), k, which)
    width = float(values.max() - values.min())
    found = result.values.numpy()
    assert result.converged.all()
    if which == "magnitude":
        exact, found = np.abs(exact), np.abs(found)
    assert np.abs(found - exact).max() <= 0.01 * width + 1e-8


def test_blocks_of_start_vectors_need_no_search_for_fewer_copies() -> None:
    matrix = with_spectrum(np.concatenate([[10.0, 10.0, 8.0, 8.0, 8.0], np.linspace(0, 5, 200)]))
    operator = Counted(matrix)
    options: dict[str, Any] = {"method": "block_lanczos", "multiplicity": True}
    result = eigsh(operator, 6, "largest", block_size=4, **options)
    np.testing.assert_allclose(result.values.numpy(), [10.0, 10.0, 8.0, 8.0, 8.0, 5.0], atol=1e-6)
    searched = eigsh(matrix, 6, "largest", block_size=2, **options)
    torch.testing.assert_close(searched.values, result.values)
    assert result.products == operator.products


def test_both_ends() -> None:
    matrix = with_spectrum(np.concatenate([[90.0, 40.0, 22.0], np.linspace(0, 1, 100), [-2.0, -3.0]]))
    for k, expected in ((1, [90.0]), (2, [90.0, -3.0]), (3, [90.0, 40.0, -3.0]), (5, [90.0, 40.0, 22.0, -2.0, -3.0])):
        np.testing.assert_allclose(eigsh(matrix, k, "both").values.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("method", OTHERS)
def test_hessian_of_a_network(method: str) -> None:
    case = make_case("mlp", torch.float64)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    dense = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets)
    for which in ("largest", "both"):
        check(eigsh(operator, 4, which, method=method), dense, 4, which, 1e-8)


@pytest.mark.parametrize("method", [*OTHERS, "power"])
def test_products_are_counted_reported_and_limited(method: str) -> None:
    operator = Counted(with_spectrum(np.linspace(0, 1, 300)))
    calls: list[int] = []
    options: dict[str, Any] = {"method": method, "max_products": 40, "tol": 1e-7, "residuals": "explicit"}
    result = eigsh(operator, 5, progress=lambda done, total: calls.append(done), **options)
    assert 30 < operator.products == result.products == calls[-1] <= 40
    assert calls == sorted(calls)
    assert result.ended == "limit"
    assert "limit" in result.status
    vectors = result.vectors
    torch.testing.assert_close(
        torch.linalg.vector_norm(operator.matrix @ vectors - vectors * result.values, dim=0), result.residuals
    )


@pytest.mark.parametrize("method", [*OTHERS, "power"])
def test_same_seed_same_result(method: str) -> None:
    matrix = with_spectrum(SPECTRA["repeated"])
    torch.manual_seed(1)
    first = eigsh(matrix, 4, method=method, multiplicity=True, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = eigsh(matrix, 4, method=method, multiplicity=True, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    other = eigsh(matrix, 4, method=method, multiplicity=True, seed=6)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values)


def test_refusals() -> None:
    matrix = with_spectrum(np.linspace(1, 2, 40), dtype=torch.float32)
    lobpcg = {"method": "lobpcg", "which": "smallest"}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"method": "arnoldi"}, ValueError, "method: expected one of 'lanczos'"),
        ({"block_size": 2}, ValueError, "block_size: expected None with method='lanczos', got 2"),
        ({"method": "block_lanczos", "block_size": 0}, ValueError, "block_size: expected between 1 and 40, got 0"),
        ({"method": "block_lanczos", "block_size": 41}, ValueError, "block_size: expected between 1 and 40, got 41"),
        ({"method": "block_lanczos", "max_products": 12, "k": 5}, ValueError, "max_products: expected at least 13"),
        ({"method": "block_lanczos", "basis_size": 14, "k": 5}, ValueError, "basis_size: expected at least 15"),
        ({"method": "lobpcg", "block_size": 2, "k": 3}, ValueError, "block_size: expected between 3 and 40, got 2"),
        ({"method": "lobpcg", "max_products": 12, "k": 5}, ValueError, "max_products: expected at least 13"),
        ({"method": "lobpcg", "basis_size": 30}, ValueError, "basis_size: expected None with method='lobpcg'"),
        ({"method": "power", "basis_size": 30}, ValueError, "basis_size: expected None with method='power'"),
        ({"method": "power", "block_size": 3}, ValueError, "block_size: expected None with method='power', got 3"),
        ({"method": "power", "which": "largest"}, ValueError, "which: power iteration finds the largest magnitudes"),
        ({"preconditioner": matrix}, ValueError, "preconditioner: is for method='lobpcg'"),
        ({"method": "lobpcg", "preconditioner": matrix}, ValueError, "preconditioner: .* got .* which='magnitude'"),
        (lobpcg | {"preconditioner": 3.0}, TypeError, "preconditioner: expected an operator with `@`"),
        (lobpcg | {"preconditioner": torch.eye(39)}, ValueError, r"preconditioner: expected shape \(40, 40\), got"),
        (lobpcg | {"preconditioner": lambda v: v[:3]}, ValueError, "preconditioner: expected a finite tensor of shape"),
        (lobpcg | {"preconditioner": lambda v: v / 0}, ValueError, "preconditioner: expected a finite tensor of shape"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.eigsh: " + match):
            eigsh(matrix, **options)
    for method in (*OTHERS, "power"):
        with pytest.raises(ValueError, match=r"kronfac.spectrum.eigsh: op: not symmetric"):
            eigsh(Counted(torch.randn(30, 30)), 3, method=method)


def test_memory_beyond_reason_is_refused() -> None:
    class Huge:
        shape = (10**9, 10**9)

        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(ValueError, match=r"'lobpcg' with 5 vectors of 1000000000 entries takes 186.3 GiB"):
        eigsh(Huge(), 2, method="lobpcg")
