"""The relation that block Lanczos keeps, whatever runs out, and what its Ritz pairs are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronfac.linalg.block_lanczos import BlockKrylovSubspace
from kronfac.linalg.probes import make_generator
from kronfac.linalg.symmetric import check_operator
from tests.linalg.matrices import Counted, with_spectrum


def _subspace(matrix: torch.Tensor, capacity: int, block: int, seed: int = 0) -> BlockKrylovSubspace:
    return BlockKrylovSubspace(check_operator(matrix, "test"), capacity, block, make_generator(seed, "test"))


def _check(subspace: BlockKrylovSubspace, matrix: torch.Tensor, slack: float = 1e-12) -> None:
    """V orthonormal, T = V A Vᵀ, and every residual what the recurrence says."""
    basis = subspace.basis[: subspace.size].double()
    scale = max(float(torch.linalg.matrix_norm(matrix.double(), 2)), 1e-300)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64), atol=slack, rtol=0.0)
    projection = torch.from_numpy(subspace.projection[: subspace.size, : subspace.size])
    torch.testing.assert_close(basis @ matrix.double() @ basis.mT, projection, atol=slack * scale, rtol=0.0)
    values, coordinates, residuals = subspace.ritz()
    vectors = subspace.vectors(coordinates).double().mT
    measured = torch.linalg.vector_norm(matrix.double() @ vectors - vectors * torch.from_numpy(values), dim=0)
    np.testing.assert_allclose(residuals, measured.numpy(), atol=10 * slack * scale)


@given(
    size=st.integers(1, 40),
    block=st.integers(1, 7),
    distinct=st.integers(1, 40),
    capacity=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
def test_relation(size: int, block: int, distinct: int, capacity: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    matrix = with_spectrum(generator.choice(generator.standard_normal(distinct), size), seed)
    subspace = _subspace(matrix, max(capacity, min(size, 2 * block + 2)), min(block, size), seed)
    for _ in range(12):
        if subspace.complete:
            break
        if subspace.full:
            values, coordinates, _ = subspace.ritz()
            keep = np.r_[0, len(values) - 1] if len(values) > 2 else np.r_[0]
            subspace.restart(values[keep], coordinates[:, keep])
        subspace.expand()
        _check(subspace, matrix)
    if subspace.complete:
        np.testing.assert_allclose(subspace.ritz()[0], np.linalg.eigvalsh(matrix.numpy()), atol=1e-12)


@pytest.mark.parametrize(
    "values", [np.zeros(9), np.ones(9), np.r_[3.0, 3.0, np.zeros(7)], 1e-30 * np.arange(1.0, 10.0)]
)
def test_spaces_that_run_out_at_once(values: npt.NDArray[np.float64]) -> None:
    matrix = with_spectrum(values)
    subspace = _subspace(matrix, 9, 4)
    while not subspace.complete:
        subspace.expand()
        _check(subspace, matrix)
    np.testing.assert_allclose(subspace.ritz()[0], np.sort(values), atol=1e-12 * np.abs(values).max())


def test_a_block_sees_as_many_copies_as_it_has_rows() -> None:
    matrix = with_spectrum(np.r_[[5.0] * 6, np.linspace(0, 1, 94)])
    for block in (1, 3, 6):
        subspace = _subspace(matrix, 60, block)
        for _ in range(8):
            subspace.expand()
        assert (np.abs(subspace.ritz()[0] - 5.0) < 1e-4).sum() == block


def test_one_row_is_single_vector_lanczos() -> None:
    from kronfac.linalg.lanczos import KrylovSubspace

    matrix = with_spectrum(np.linspace(-1, 2, 50))
    single = KrylovSubspace(check_operator(matrix, "test"), 20, make_generator(3, "test"))
    block = _subspace(matrix, 20, 1, 3)
    for _ in range(20):
        single.expand()
        block.expand()
    np.testing.assert_allclose(block.ritz()[0], single.ritz()[0], atol=1e-13)
    np.testing.assert_allclose(block.ritz()[2], single.ritz()[2], atol=1e-12)


def test_products_of_a_block_share_a_call() -> None:
    operator = Counted(with_spectrum(np.linspace(-1, 2, 50)))
    subspace = BlockKrylovSubspace(check_operator(operator, "test"), 20, 4, make_generator(0, "test"))
    subspace.expand()
    assert operator.products == 4
    assert subspace.size == 4


def test_restart_keeps_the_pairs_and_their_directions() -> None:
    matrix = with_spectrum(np.linspace(-1, 2, 60))
    subspace = _subspace(matrix, 24, 3)
    for _ in range(8):
        subspace.expand()
    values, coordinates, residuals = subspace.ritz()
    subspace.restart(values[-5:], coordinates[:, -5:])
    again, _, after = subspace.ritz()
    np.testing.assert_allclose(again, values[-5:], atol=1e-13)
    np.testing.assert_allclose(after, residuals[-5:], atol=1e-13)
    subspace.expand()
    _check(subspace, matrix)
    assert subspace.ritz()[0][-1] >= values[-1]


def test_float32() -> None:
    matrix = with_spectrum(np.r_[90.0, 90.0, 40.0, np.linspace(0, 1, 197)], dtype=torch.float32)
    subspace = _subspace(matrix, 60, 4)
    for _ in range(15):
        subspace.expand()
    _check(subspace, matrix, 5e-6)


def test_asymmetry_is_noticed() -> None:
    for matrix in (torch.randn(30, 30), torch.randn(30, 30, dtype=torch.float64)):
        operator = check_operator(Counted(matrix), "test")
        subspace = BlockKrylovSubspace(operator, 20, 3, make_generator(0, "test"))
        with pytest.raises(ValueError, match="test: op: not symmetric"):
            subspace.expand()
    # within a block it holds, but not between blocks
    shift = torch.diag(torch.ones(29), 1)
    subspace = BlockKrylovSubspace(check_operator(Counted(shift), "test"), 20, 1, make_generator(0, "test"))
    subspace.expand()
    with pytest.raises(ValueError, match="test: op: not symmetric"):
        subspace.expand()
