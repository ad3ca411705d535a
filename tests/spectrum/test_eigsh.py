from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronfac.operators import ggn, hessian
from kronfac.spectrum import eigsh
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import CASES, dense_hessian, make_case
from tests.spectrum.eigenpairs import ORDERS, SPECTRA, check, wanted


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ORDERS)
def test_equals_numpy(name: str, which: str) -> None:
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    for k in sorted({1, min(7, len(values)), len(values) if len(values) <= 40 else 12}):
        check(eigsh(matrix, k, which, tol=1e-7, multiplicity=True), matrix, k, which, 1e-8)


@pytest.mark.parametrize("name", ["gaussian", "repeated", "low_rank", "network", "zero", "identity"])
@pytest.mark.parametrize("which", ORDERS)
def test_float32(name: str, which: str) -> None:
    matrix = with_spectrum(SPECTRA[name], dtype=torch.float32)
    result = eigsh(matrix, min(7, len(matrix)), which, multiplicity=True)
    assert result.values.dtype == torch.float32
    check(result, matrix, min(7, len(matrix)), which, 3e-6)


@given(
    size=st.integers(1, 60),
    distinct=st.integers(1, 60),
    share=st.floats(0, 1),
    which=st.sampled_from(ORDERS),
    basis=st.sampled_from([None, 0, 1, 5]),
    seed=st.integers(0, 10_000),
)
def test_any_multiplicities_and_storage(
    size: int, distinct: int, share: float, which: str, basis: int | None, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.choice(generator.standard_normal(distinct), size)
    matrix = with_spectrum(values, seed)
    k = max(1, round(share * size))
    basis_size = None if basis is None else min(size, k + 3) + basis
    options: dict[str, Any] = {"basis_size": basis_size, "max_products": 20_000, "multiplicity": True}
    result = eigsh(matrix, k, which, tol=1e-7, seed=seed, **options)
    # Beyond 1 % of the spectrum's width no eigenvalue may be missed; within, a neighbour may stand in.
    exact = wanted(np.linalg.eigvalsh(matrix.numpy()), k, which)
    width = float(values.max() - values.min())
    found = result.values.numpy()
    assert result.converged.all()
    if which == "magnitude":
        exact, found = np.abs(exact), np.abs(found)
    assert np.abs(found - exact).max() <= 0.01 * width + 1e-8


def test_finds_every_copy_of_a_top_eigenvalue() -> None:
    values = np.concatenate([[10.0] * 6, np.linspace(0, 5, 200)])
    matrix = with_spectrum(values)
    found = eigsh(matrix, 8, multiplicity=True)
    np.testing.assert_allclose(found.values.numpy(), [10.0] * 6 + [5.0, values[-2]], atol=1e-7)
    single = eigsh(matrix, 2)
    assert float(single.values[0]) == pytest.approx(10.0)
    assert single.converged.all()
    assert single.products < eigsh(matrix, 2, multiplicity=True).products


def test_finds_every_copy_of_the_smallest_without_being_asked() -> None:
    matrix = with_spectrum(np.concatenate([np.zeros(5), np.linspace(1, 2, 100)]))
    np.testing.assert_allclose(eigsh(matrix, 6, "smallest").values.numpy(), [0.0] * 5 + [1.0], atol=1e-5)
    np.testing.assert_allclose(eigsh(-matrix, 6, "both").values[:3].numpy(), [0.0] * 3, atol=1e-5)
    without = eigsh(matrix, 6, "smallest", multiplicity=False)
    assert without.products < eigsh(matrix, 6, "smallest").products


def test_restarts_with_little_storage() -> None:
    matrix = with_spectrum(SPECTRA["gaussian"])
    small = eigsh(matrix, 5, basis_size=12, tol=1e-7)
    check(small, matrix, 5, "magnitude", 1e-8)
    large = eigsh(matrix, 5, tol=1e-7)
    assert small.products > large.products > 5


@pytest.mark.parametrize("name", CASES)
def test_hessians_of_networks(name: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        case = make_case(name, dtype)
        result = eigsh(hessian(case.model, case.loss_fn, (case.inputs, case.targets)), 6)
        exact = case.to(torch.float64)
        dense = dense_hessian(exact.model, exact.loss_fn, exact.inputs, exact.targets)
        expected = wanted(np.linalg.eigvalsh(dense.numpy()), 6, "magnitude")
        np.testing.assert_allclose(result.values.double().numpy(), expected, atol=tolerance * abs(expected[0]))
        assert result.converged.all()
        assert float(result.residuals.max()) <= 1e-3 * abs(float(result.values[0]))


def test_blocks_of_a_network() -> None:
    case = make_case("convnet")
    operator = ggn(case.model, case.loss_fn, (case.inputs, case.targets))
    for block in operator.blocks().values():
        top = eigsh(block, 1, "largest").values[0]
        assert float(top) == pytest.approx(float(torch.linalg.eigvalsh(block.to_dense())[-1]), rel=1e-8)


def test_many_parameters_in_float32() -> None:
    # Sums over n = 10⁶ entries in float32 would put every value off by 10⁻⁴.
    diagonal = torch.from_numpy(np.random.default_rng(0).exponential(0.2, 1_000_000)).float()
    diagonal[:4] = torch.tensor([90.0, 90.0, 40.0, -22.0])

    class Diagonal:
        shape = (len(diagonal), len(diagonal))
        dtype = torch.float32

        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            return vectors * (diagonal if vectors.ndim == 1 else diagonal[:, None])

    result = eigsh(Diagonal(), 4, multiplicity=True)
    np.testing.assert_allclose(result.values.numpy(), [90.0, 90.0, 40.0, -22.0], rtol=2e-6)
    assert result.converged.all()


def test_products_are_counted_and_reported() -> None:
    operator = Counted(with_spectrum(SPECTRA["network"]))
    calls: list[tuple[int, int | None]] = []
    result = eigsh(operator, 4, progress=lambda done, total: calls.append((done, total)))
    assert result.products == operator.products == calls[-1][0]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_budget() -> None:
    operator = Counted(with_spectrum(np.linspace(0, 1, 300)))
    result = eigsh(operator, 5, max_products=20, tol=1e-7, residuals="explicit")
    assert operator.products == result.products == 20
    assert not result.converged.all()
    assert float(result.residuals.max()) > 1e-7
    vectors = result.vectors
    torch.testing.assert_close(
        torch.linalg.vector_norm(operator.matrix @ vectors - vectors * result.values, dim=0), result.residuals
    )


def test_same_seed_same_result() -> None:
    matrix = with_spectrum(SPECTRA["repeated"])
    torch.manual_seed(1)
    first = eigsh(matrix, 4, seed=5, multiplicity=True)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = eigsh(matrix, 4, seed=5, multiplicity=True)
    assert torch.equal(torch.get_rng_state(), state)
    other = eigsh(matrix, 4, seed=6, multiplicity=True)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values)


def test_refusals() -> None:
    matrix = torch.eye(4)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"k": 5}, ValueError, "k: expected at most n = 4 eigenpairs, got 5"),
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k: expected an integer"),
        ({"which": "LM"}, ValueError, "which: expected one of 'magnitude', 'largest', 'smallest', 'both', got 'LM'"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite number greater than 0"),
        ({"tol": float("nan")}, ValueError, "tol: expected a finite number"),
        ({"tol": "1"}, TypeError, "tol: expected a number"),
        ({"k": 2, "max_products": 3}, ValueError, "max_products: expected at least 4, got 3"),
        ({"basis_size": 2}, ValueError, "basis_size: expected at least 4, got 2"),
        ({"residuals": "none"}, ValueError, "residuals: expected one of 'recurrence', 'explicit', got 'none'"),
        ({"seed": -1}, ValueError, "seed: expected an integer"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match="kronfac.spectrum.eigsh: " + match):
            eigsh(matrix, **options)
    with pytest.raises(ValueError, match=r"kronfac.spectrum.eigsh: op: not symmetric"):
        eigsh(Counted(torch.randn(30, 30)), 3)
