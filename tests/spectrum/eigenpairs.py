"""Spectra to find eigenvalues of, and what a right answer is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kronfac.spectrum import EigenResult

ORDERS = ("magnitude", "largest", "smallest", "both")


def wanted(values: npt.NDArray[np.float64], k: int, which: str) -> npt.NDArray[np.float64]:
    """The k values that are asked for, of ascending ones, in the order of the result."""
    if which == "both":
        return np.r_[values[::-1][: (k + 1) // 2], values[: k // 2][::-1]]
    keys = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}[which]
    return values[np.argsort(keys, kind="stable")][:k]


def check(result: EigenResult, matrix: torch.Tensor, k: int, which: str, tolerance: float) -> None:
    """Values against numpy's, order, residuals, orthonormal vectors, flags."""
    dense = matrix.double()
    exact = np.linalg.eigvalsh(dense.numpy())
    norm = float(np.abs(exact).max())
    values = result.values.double().numpy()
    expected = wanted(exact, k, which)
    if which == "magnitude":  # λ and -λ may come in either order
        np.testing.assert_allclose(np.abs(values), np.abs(expected), atol=tolerance * norm)
        assert (np.diff(np.abs(values)) <= 1e-6 * norm).all()
    else:
        np.testing.assert_allclose(values, expected, atol=tolerance * norm)
    vectors = result.vectors.double()
    assert vectors.shape == (len(dense), k)
    slack = 1e-12 if matrix.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), atol=slack, rtol=0.0)
    residuals = torch.linalg.vector_norm(dense @ vectors - vectors * result.values.double(), dim=0)
    if result.measured:
        torch.testing.assert_close(residuals, result.residuals.double(), atol=slack * max(norm, 1e-300), rtol=0.0)
    else:
        assert (residuals <= result.residuals.double() + slack * norm).all()
    assert result.converged.dtype == torch.bool
    assert result.converged.all()


SPECTRA: dict[str, npt.NDArray[np.float64]] = {
    "gaussian": np.random.default_rng(0).standard_normal(200),
    "repeated": np.concatenate([[5, 5, 5, 4, 4, -6, -6], np.random.default_rng(1).uniform(-1, 1, 143)]),
    "identity": np.ones(20),
    "plus_minus": np.array([3.0] * 10 + [-3.0] * 10),
    "low_rank": np.concatenate([[3.0, 2.0, 1.0], np.zeros(97)]),
    "decaying": 1.0 / np.arange(1, 151) ** 2,
    "network": np.concatenate([[90, 40, 22, 21, -3], np.random.default_rng(2).exponential(0.2, 295)]),
    "negative": -np.linspace(1, 2, 30),
    "one": np.array([2.5]),
    "two": np.array([1.0, -1.0]),
    "zero": np.zeros(7),
    "tiny": 1e-30 * np.linspace(1, 3, 40),
    "huge": 1e30 * np.linspace(1, 3, 40),
}
