"""A real Ctrl-C halfway: what comes back is what had been computed, marked as such."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from kronfac.spectrum import eigsh
from kronfac.spectrum.eigsh import METHODS
from tests.linalg.matrices import Counted, with_spectrum

_NETWORK = np.concatenate([[90.0, 40.0, 22.0, 21.0, -3.0], np.random.default_rng(2).exponential(0.2, 295)])


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Python's own handler within each test, and the one found after it."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, found)


def at(products: int, times: int = 1) -> Callable[[int, int | None], None]:
    """A progress callback that presses Ctrl-C as soon as so many products are done."""
    pressed = [0]

    def press(done: int, total: int | None) -> None:
        while done >= products and pressed[0] < times:
            pressed[0] += 1
            os.kill(os.getpid(), signal.SIGINT)

    return press


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("products", [1, 12, 30])
def test_eigenpairs(method: str, products: int) -> None:
    operator = Counted(with_spectrum(_NETWORK))
    result = eigsh(operator, 5, "largest", method=method, tol=1e-8, progress=at(products))
    assert result.interrupted
    assert result.ended == "interrupted"
    assert operator.products == result.products <= products + 12  # no more than the call that was under way
    count = len(result.values)
    assert 1 <= count <= 5
    assert result.vectors.shape == (300, count)
    vectors, values = result.vectors, result.values
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(count, dtype=torch.float64), atol=1e-12, rtol=0.0)
    residuals = torch.linalg.vector_norm(operator.matrix @ vectors - vectors * values, dim=0)
    assert (residuals <= result.residuals + 1e-12 * 90).all()
    assert (result.residuals <= residuals + 1e-8 * 90).all()  # bounds that say no less than needed
    assert (residuals[result.converged] <= 1e-8 * 90).all()
    assert result.status == ["converged" if met else "interrupted" for met in result.converged.tolist()]
    assert products > 12 or not result.converged.all()


@pytest.mark.parametrize("method", METHODS)
def test_eigenpairs_that_had_converged_are_marked(method: str) -> None:
    matrix = with_spectrum(np.concatenate([[1000.0, 500.0], np.linspace(0, 1, 298)]))
    result = eigsh(matrix, 12, "largest", method=method, tol=1e-9, block_size=None, progress=at(100))
    assert result.interrupted
    assert result.status[:2] == ["converged", "converged"]
    assert "interrupted" in result.status
    np.testing.assert_allclose(result.values[:2].numpy(), [1000.0, 500.0], rtol=1e-12)


def test_a_second_one_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        eigsh(with_spectrum(_NETWORK), 5, progress=at(10, times=2))


def test_uninterrupted_work_says_so() -> None:
    assert not eigsh(with_spectrum(_NETWORK), 2).interrupted
