from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronfac.ops as ops
from kronfac.linalg import KrylovSubspace, check_operator, lanczos_quadratures, make_generator
from kronfac.linalg.subspace import orthogonalize_product_
from tests.linalg.matrices import Counted, with_spectrum


def _subspace(matrix: torch.Tensor, capacity: int) -> KrylovSubspace:
    return KrylovSubspace(check_operator(matrix, "test"), capacity, make_generator(0, "test"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_200_steps_without_spurious_copies(dtype: torch.dtype) -> None:
    # One eigenvalue far out converges in a few steps; without reorthogonalisation copies of it appear soon after.
    values = np.concatenate([[1000.0, 300.0, -200.0], np.linspace(-1, 1, 397)])
    subspace = _subspace(with_spectrum(values, dtype=dtype), 200)
    for _ in range(200):
        subspace.expand()
    ritz, _, _ = subspace.ritz()
    assert [int((np.abs(ritz - far) < 1).sum()) for far in (1000.0, 300.0, -200.0)] == [1, 1, 1]
    defect = subspace.basis @ subspace.basis.mT - torch.eye(200, dtype=dtype)
    assert float(defect.abs().max()) < 20 * torch.finfo(dtype).eps


@given(
    size=st.integers(2, 40),
    distinct=st.integers(1, 5),
    capacity=st.integers(1, 40),
    seed=st.integers(0, 100),
    restarts=st.integers(0, 2),
)
def test_ritz_pairs_satisfy_their_residuals(size: int, distinct: int, capacity: int, seed: int, restarts: int) -> None:
    """Through break-downs of the Krylov space and restarts: the basis stays orthonormal, the residuals true."""
    generator = np.random.default_rng(seed)
    matrix = with_spectrum(generator.choice(generator.standard_normal(distinct), size), seed)
    subspace = _subspace(matrix, capacity)
    for attempt in range(restarts + 1):
        while not subspace.full:
            subspace.expand()
        values, coordinates, residuals = subspace.ritz()
        vectors = subspace.vectors(coordinates)
        gram = vectors @ vectors.mT
        torch.testing.assert_close(gram, torch.eye(subspace.size, dtype=torch.float64), atol=1e-12, rtol=0.0)
        measured = torch.linalg.vector_norm(vectors @ matrix - torch.from_numpy(values)[:, None] * vectors, dim=1)
        np.testing.assert_allclose(measured.numpy(), residuals, atol=1e-12)
        if attempt < restarts and capacity > 1 and not subspace.complete:
            kept = max(1, subspace.size // 2)
            subspace.restart(values[-kept:], coordinates[:, -kept:])
    if subspace.complete:
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix.numpy()), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strayed", [0.0, 1e-3, 0.3, 1e4])
def test_one_pass_or_two_leave_the_product_orthogonal(dtype: torch.dtype, strayed: float) -> None:
    """Also where it couples to rows that it should not couple to, little or more than anything else."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(500, 40, generator=generator, dtype=torch.float64))[0].mT.to(dtype).contiguous()
    rest = torch.randn(500, generator=generator, dtype=torch.float64)
    rest -= basis.double().mT @ (basis.double() @ rest)
    rest /= rest.norm()
    parts = torch.zeros(40, dtype=torch.float64)
    parts[38:] = torch.tensor([70.0, -300.0])
    parts[5] = strayed
    product = (basis.double().mT @ parts + rest).to(dtype)
    found = orthogonalize_product_(product, basis, 38)
    epsilon = torch.finfo(dtype).eps
    np.testing.assert_allclose(found, parts.numpy(), atol=100 * epsilon * max(300.0, strayed))
    # What is left has length 1; the round-off of the product itself stays in it.
    torch.testing.assert_close(product.double(), rest, rtol=0.0, atol=10 * epsilon * max(300.0, strayed))
    assert float((basis.double() @ product.double()).abs().max()) < 20 * epsilon


def test_how_often_the_basis_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once projected and once subtracted, besides the two rows that the recurrence names."""
    calls: list[tuple[int, int]] = []

    def counted(w: torch.Tensor, basis: torch.Tensor, passes: int = 2) -> torch.Tensor:
        calls.append((len(basis), passes))
        return ops.orthogonalize_(w, basis, passes)

    monkeypatch.setattr("kronfac.linalg.subspace.orthogonalize_", counted)
    subspace = _subspace(with_spectrum(np.linspace(-1, 1, 60)), 30)
    subspace.expand()
    calls.clear()  # those of the random start are among them
    for _ in range(29):
        subspace.expand()
    assert calls[:6] == [(rows, 2) for rows in range(2, 8)]
    assert calls[6:] == [call for rows in range(8, 31) for call in ((2, 1), (rows, 1))]


def test_restart_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.linalg.subspace._RESTART_COLUMNS", 7)
    matrix = with_spectrum(np.linspace(-1, 2, 30))
    subspace = _subspace(matrix, 10)
    for _ in range(10):
        subspace.expand()
    values, coordinates, _ = subspace.ritz()
    expected = subspace.vectors(coordinates[:, 4:])
    subspace.restart(values[4:], coordinates[:, 4:])
    torch.testing.assert_close(subspace.basis[:6], expected)


def test_quadrature_is_exact_for_polynomials() -> None:
    # m nodes integrate polynomials of degree 2m - 1 with respect to the spectral measure of the start vector.
    matrix = with_spectrum(np.linspace(-1, 1, 60))
    starts = torch.randn(60, 3, dtype=torch.float64)
    operator = Counted(matrix)
    quadratures, products = lanczos_quadratures(check_operator(operator, "test"), starts, 5)
    assert products == operator.products == 15
    for quadrature, start in zip(quadratures, starts.mT, strict=True):
        unit = start / start.norm()
        power = unit
        for degree in range(10):
            moment = float(quadrature.weights @ quadrature.nodes**degree)
            np.testing.assert_allclose(moment, float(unit @ power), atol=1e-12)
            power = matrix @ power


def test_quadratures_that_end_early() -> None:
    matrix = with_spectrum([2.0] * 5 + [-1.0] * 7 + [0.5] * 8)
    starts = torch.randn(20, 4, dtype=torch.float64)
    starts[:, 1] = torch.linalg.eigh(matrix)[1][:, -1]  # an eigenvector
    quadratures, products = lanczos_quadratures(check_operator(matrix, "test"), starts, 20)
    assert [len(quadrature.nodes) for quadrature in quadratures] == [3, 1, 3, 3]
    assert products == 10
    np.testing.assert_allclose(quadratures[0].nodes, [-1.0, 0.5, 2.0], atol=1e-12)
    np.testing.assert_allclose(quadratures[1].weights, [1.0])


def test_asymmetry_is_noticed() -> None:
    matrix = torch.randn(50, 50, dtype=torch.float64)
    operator = check_operator(Counted(matrix), "caller")
    subspace = KrylovSubspace(operator, 20, make_generator(0, "test"))
    subspace.expand()
    with pytest.raises(ValueError, match=r"caller: op: not symmetric"):
        subspace.expand()
    with pytest.raises(ValueError, match=r"caller: op: not symmetric"):
        lanczos_quadratures(operator, torch.randn(50, 2, dtype=torch.float64), 10)
