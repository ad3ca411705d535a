"""Every method for eigenpairs against LAPACK, on spectra that are easy to get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronfac.operators import hessian
from kronfac.spectrum import eigsh
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import dense_hessian, make_case
from tests.spectrum.eigenpairs import ORDERS, SPECTRA, check, wanted

BLOCK = ("block_lanczos",)


@pytest.mark.parametrize("method", BLOCK)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ORDERS)
def test_equals_numpy(name: str, which: str, method: str) -> None:
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    for k in sorted({1, min(7, len(values))}):
        result = eigsh(matrix, k, which, method=method, tol=1e-7)
        check(result, matrix, k, which, 1e-8)
        assert result.status == ["converged"] * k


@pytest.mark.parametrize("method", BLOCK)
@pytest.mark.parametrize("name", ["repeated", "low_rank", "network", "identity"])
def test_float32(name: str, method: str) -> None:
    matrix = with_spectrum(SPECTRA[name], dtype=torch.float32)
    result = eigsh(matrix, min(7, len(matrix)), "largest", method=method)
    assert result.values.dtype == torch.float32
    check(result, matrix, min(7, len(matrix)), "largest", 3e-6)


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
    result = eigsh(matrix, k, which, method="block_lanczos", tol=1e-7, seed=seed, **options)
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
    result = eigsh(operator, 6, "largest", method="block_lanczos", block_size=4)
    np.testing.assert_allclose(result.values.numpy(), [10.0, 10.0, 8.0, 8.0, 8.0, 5.0], atol=1e-6)
    searched = eigsh(matrix, 6, "largest", method="block_lanczos", block_size=2)
    torch.testing.assert_close(searched.values, result.values)
    assert result.products == operator.products


def test_both_ends() -> None:
    matrix = with_spectrum(np.concatenate([[90.0, 40.0, 22.0], np.linspace(0, 1, 100), [-2.0, -3.0]]))
    for k, expected in ((1, [90.0]), (2, [90.0, -3.0]), (3, [90.0, 40.0, -3.0]), (5, [90.0, 40.0, 22.0, -2.0, -3.0])):
        np.testing.assert_allclose(eigsh(matrix, k, "both").values.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("method", BLOCK)
def test_hessian_of_a_network(method: str) -> None:
    case = make_case("mlp", torch.float64)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    dense = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets)
    for which in ("largest", "smallest"):
        check(eigsh(operator, 4, which, method=method), dense, 4, which, 1e-8)


@pytest.mark.parametrize("method", BLOCK)
def test_products_are_counted_reported_and_limited(method: str) -> None:
    operator = Counted(with_spectrum(np.linspace(0, 1, 300)))
    calls: list[int] = []
    options: dict[str, Any] = {"method": method, "max_products": 40, "tol": 1e-7}
    result = eigsh(operator, 5, "largest", progress=lambda done, total: calls.append(done), **options)
    assert 30 < operator.products == result.products == calls[-1] <= 40
    assert calls == sorted(calls)
    assert result.ended == "limit"
    assert "limit" in result.status
    vectors = result.vectors
    torch.testing.assert_close(
        torch.linalg.vector_norm(operator.matrix @ vectors - vectors * result.values, dim=0), result.residuals
    )


@pytest.mark.parametrize("method", BLOCK)
def test_same_seed_same_result(method: str) -> None:
    matrix = with_spectrum(SPECTRA["repeated"])
    torch.manual_seed(1)
    first = eigsh(matrix, 4, method=method, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = eigsh(matrix, 4, method=method, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    other = eigsh(matrix, 4, method=method, seed=6)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values)


def test_refusals() -> None:
    matrix = torch.eye(40)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"method": "arnoldi"}, ValueError, "method: expected one of 'lanczos'"),
        ({"block_size": 2}, ValueError, "block_size: expected None with method='lanczos', got 2"),
        ({"method": "block_lanczos", "block_size": 0}, ValueError, "block_size: expected between 1 and 40, got 0"),
        ({"method": "block_lanczos", "block_size": 41}, ValueError, "block_size: expected between 1 and 40, got 41"),
        ({"method": "block_lanczos", "max_products": 12, "k": 5}, ValueError, "max_products: expected at least 13"),
        ({"method": "block_lanczos", "basis_size": 14, "k": 5}, ValueError, "basis_size: expected at least 15"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.eigsh: " + match):
            eigsh(matrix, **options)
    for method in BLOCK:
        with pytest.raises(ValueError, match=r"kronfac.spectrum.eigsh: op: not symmetric"):
            eigsh(Counted(torch.randn(30, 30)), 3, "largest", method=method)
