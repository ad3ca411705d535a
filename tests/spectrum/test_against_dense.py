"""Operators, eigenvalues and densities of trained networks against the dense matrices and LAPACK, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import wasserstein_distance

from kronfac.linalg import KrylovSubspace, check_operator, lanczos_quadratures, make_generator
from kronfac.spectrum import density, eigsh
from tests.operators.cases import relative_error
from tests.operators.state import unchanged
from tests.spectrum.trained import KINDS, Trained

Float64Array = npt.NDArray[np.float64]
ORDERS = ("magnitude", "largest", "smallest")

# What LAPACK's eigenvalues and a measured residual may be off by, relative to the norm.
_ROUND_OFF = 1e-14


def _wanted(values: Float64Array, k: int, which: str) -> Float64Array:
    keys = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}[which]
    return values[np.argsort(keys, kind="stable")][:k]


def unmatched(values: Float64Array, radii: Float64Array, spectrum: Float64Array) -> list[float]:
    """The values that find no eigenvalue of their own within their radius: copies that the spectrum does not have.

    Eigenvalues in ascending order each go to the open interval that ends first, which leaves as few as possible.
    """
    order = np.argsort(values + radii)
    values, radii = values[order], radii[order]
    taken = np.zeros(len(values), dtype=bool)
    for eigenvalue in np.sort(spectrum):
        open_ = ~taken & (np.abs(values - eigenvalue) <= radii)
        if open_.any():
            taken[np.argmax(open_)] = True
    return [float(value) for value in values[~taken]]


@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_those_of_the_dense_matrix(network: Trained, kind: str) -> None:
    dense = network.dense(kind)
    generator = torch.Generator().manual_seed(0)
    # Random vectors see every entry: a wrong one would hide from six of them with probability zero.
    columns = torch.randn(len(dense), 6, generator=generator, dtype=torch.float64)
    with unchanged(network.model):
        operator = network.operator(kind)
        product = operator @ columns
    assert operator.shape == tuple(dense.shape)
    assert relative_error(product, dense @ columns) < 1e-12
    for name, block in operator.blocks().items():
        index = network.groups()[name]
        assert relative_error(block @ columns[index], dense[index][:, index] @ columns[index]) < 1e-12
        assert operator.entries_of(block).tolist() == index.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_of_the_dense_matrix(network: Trained, kind: str) -> None:
    assert relative_error(network.operator(kind).to_dense(), network.dense(kind)) < 1e-12


# A Gauss-Newton matrix is positive semi-definite: its largest are those of largest magnitude.
@pytest.mark.parametrize(("kind", "which"), [*(("hessian", which) for which in ORDERS), ("ggn", "largest")])
def test_top_twenty(network: Trained, kind: str, which: str) -> None:
    dense, spectrum = network.dense(kind), network.spectrum(kind)
    norm = float(np.abs(spectrum).max())
    result = eigsh(network.operator(kind), 20, which, tol=1e-7)
    values, residuals = result.values.numpy(), result.residuals.numpy()
    assert result.converged.all()
    np.testing.assert_allclose(values, _wanted(spectrum, 20, which), rtol=1e-6)
    measured = torch.linalg.vector_norm(dense @ result.vectors - result.vectors * result.values, dim=0)
    if result.measured:
        np.testing.assert_allclose(residuals, measured.numpy(), atol=_ROUND_OFF * norm)
    assert (measured.numpy() <= residuals + _ROUND_OFF * norm).all()
    assert not unmatched(values, residuals + _ROUND_OFF * norm, spectrum)


@pytest.mark.parametrize("which", ORDERS)
@pytest.mark.parametrize("products", [45, 60])
def test_residuals_bound_the_error_where_it_is_not_converged(network: Trained, which: str, products: int) -> None:
    dense, spectrum = network.dense("hessian"), network.spectrum("hessian")
    norm = float(np.abs(spectrum).max())
    result = eigsh(dense, 20, which, max_products=products, tol=1e-7, residuals="explicit")
    values, residuals = result.values.numpy(), result.residuals.numpy()
    assert result.products <= products
    assert not result.converged.all()
    assert (result.residuals[result.converged] <= 1e-7 * norm).all()
    errors = np.abs(values[:, None] - spectrum).min(1)
    assert (errors <= residuals + _ROUND_OFF * norm).all()
    assert float(residuals.max()) > 1e-3 * norm  # else nothing was left to bound


@pytest.mark.parametrize(
    ("tol", "products", "converges"), [(1e-7, 300, False), pytest.param(1e-5, 4000, True, marks=pytest.mark.slow)]
)
def test_zeros_of_a_singular_matrix(network: Trained, tol: float, products: int, converges: bool) -> None:
    """A thousand zeros below eigenvalues that decay towards them: no gap, and one copy per Krylov sequence.

    Twenty of them take 2,500 products at the default tolerance, more than the matrix has columns. Before that the
    result says that they have not converged: its residuals bound the distance to some eigenvalue, not to the zeros.
    """
    spectrum = network.spectrum("ggn")
    norm = float(spectrum[-1])
    assert abs(float(spectrum[100])) <= _ROUND_OFF * norm
    result = eigsh(network.dense("ggn"), 20, "smallest", tol=tol, max_products=products)
    assert bool(result.converged.all()) is converges
    values, residuals = result.values.numpy(), result.residuals.numpy()
    assert (values >= -_ROUND_OFF * norm).all()
    assert (np.abs(values[:, None] - spectrum).min(1) <= residuals + _ROUND_OFF * norm).all()
    # A residual of tol may belong to an eigenvalue next to the zeros: values are wrong by about it, not by its square.
    assert float(values.max()) <= (2e-5 if converges else 1e-3) * norm
    assert (residuals[result.converged.numpy()] <= tol * norm).all()
    assert not unmatched(values, residuals + _ROUND_OFF * norm, spectrum)


@pytest.mark.parametrize("kind", ["hessian", pytest.param("ggn", marks=pytest.mark.slow)])
def test_200_steps_have_no_spurious_copies(network: Trained, kind: str) -> None:
    operator = check_operator(network.dense(kind), "test")
    spectrum = network.spectrum(kind)
    norm = float(np.abs(spectrum).max())
    subspace = KrylovSubspace(operator, 200, make_generator(0, "test"))
    for _ in range(200):
        subspace.expand()
    values, _, residuals = subspace.ritz()
    converged = residuals <= 1e-6 * norm
    assert int(converged.sum()) >= 15
    assert not unmatched(values[converged], residuals[converged] + _ROUND_OFF * norm, spectrum)
    start = torch.randn(len(spectrum), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (quadrature,), _ = lanczos_quadratures(operator, start, 200)
    for eigenvalue in spectrum[-10:]:
        assert int((np.abs(quadrature.nodes - eigenvalue) <= 1e-7 * norm).sum()) == 1


def test_the_search_for_copies_notices_them(network: Trained) -> None:
    """Lanczos without reorthogonalisation, as other tools run it, does have copies of the largest eigenvalues."""
    dense, spectrum = network.dense("hessian").numpy(), network.spectrum("hessian")
    norm = float(np.abs(spectrum).max())
    diagonal, betas = [], []
    vector = np.random.default_rng(0).standard_normal(len(dense))
    vector /= np.linalg.norm(vector)
    before, beta = np.zeros_like(vector), 0.0
    for _ in range(200):
        product = dense @ vector - beta * before
        diagonal.append(float(product @ vector))
        product -= diagonal[-1] * vector
        beta = float(np.linalg.norm(product))
        betas.append(beta)
        before, vector = vector, product / beta
    values, coordinates = np.linalg.eigh(np.diag(diagonal) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
    residuals = np.abs(beta * coordinates[-1])
    converged = residuals <= 1e-6 * norm
    assert unmatched(values[converged], residuals[converged] + 1e-9 * norm, spectrum)


@pytest.mark.parametrize("kind", KINDS)
def test_density(network: Trained, kind: str) -> None:
    spectrum = network.spectrum(kind)
    width = float(spectrum[-1] - spectrum[0])
    result = density(network.dense(kind))  # 10 probes of 80 steps
    nodes, weights = result.nodes.numpy(), result.weights.numpy()
    assert wasserstein_distance(nodes, spectrum, weights) <= 0.02 * width
    assert wasserstein_distance(result.grid.numpy(), spectrum, result.values.numpy()) <= 0.02 * width
    assert abs(result.trace - spectrum.sum()) <= 4 * result.trace_stderr
    assert abs(result.squared_frobenius - (spectrum**2).sum()) <= 4 * result.squared_frobenius_stderr
