"""A factor that cannot be inverted costs its own layer the inverse, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronfac.curvature import adapter_for
from kronfac.optim.structures import Averages, structure_for
from kronfac.optim.structures.dense import DenseEigen, DenseInverse
from kronfac.optim.structures.ekfac import Ekfac
from kronfac.optim.structures.mini_block import MOMENTS


def positive(*shape: int) -> Tensor:
    root = torch.randn(*shape[:-1], shape[-1] + 2, dtype=torch.float64)
    return root @ root.mT


def spoilt(matrix: Tensor) -> Tensor:
    result = matrix.clone()
    result.view(-1)[-1] = torch.nan
    return result


def block(G: Tensor) -> Averages:
    return Averages(torch.ones(1, 1, dtype=G.dtype), G, {})


@pytest.mark.parametrize("kind", [DenseInverse, DenseEigen])
def test_dense_blocks(kind: Any) -> None:
    good, other = positive(5, 3, 3), positive(5, 3, 3)
    done = kind().factorise([block(good), block(spoilt(other))], [0.1, 0.1])
    assert done.values[1] is None
    V = torch.randn(5, 3, 1, dtype=torch.float64)
    P, dots = kind().apply([V], [done.values[0]], [0.1])
    exact = torch.linalg.solve(good + 0.1 * torch.eye(3, dtype=V.dtype), V)
    torch.testing.assert_close(P[0], exact)
    torch.testing.assert_close(dots[0], (exact * V).sum())


def test_dense_blocks_one_by_one_where_the_stack_resists(monkeypatch: pytest.MonkeyPatch) -> None:
    G = positive(4, 3, 3)
    original = torch.linalg.eigh

    def eigh(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        if matrix.dim() == 3:
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return original(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    done = DenseEigen().factorise([block(G)], [0.2])
    assert done.values[0] is not None
    V = torch.randn(4, 3, 2, dtype=torch.float64)
    P, _ = DenseEigen().apply([V], [done.values[0]], [0.2])
    torch.testing.assert_close(P[0], torch.linalg.solve(G + 0.2 * torch.eye(3, dtype=V.dtype), V))


def test_a_basis_of_ekfac() -> None:
    A, G = positive(4, 4), positive(3, 3)
    some = [Averages(spoilt(A), G, {}), Averages(A, G, {})]
    broken, whole = Ekfac().factorise(some, [0.1, 0.1]).values
    assert broken is None
    assert whole is not None
    Q, values = whole["right_vectors"], whole["right_values"]
    torch.testing.assert_close(Q @ values.diag() @ Q.mT, A)


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_one_slice_of_a_mini_block(solve: str) -> None:
    adapter = adapter_for(nn.Linear(6, 8, dtype=torch.float64))
    assert adapter is not None
    structure = structure_for("mini_block", solve).by_block["pairs"]
    shape = structure.statistics(adapter)[MOMENTS].shape
    inputs, outputs = adapter.factor_sizes
    A, G = (torch.empty(0, size, dtype=torch.float64) for size in (inputs, outputs))
    moments = torch.zeros(shape, dtype=torch.float64)
    broken = moments.clone()
    broken.view(-1)[0] = torch.nan
    values = structure.factorise([Averages(A, G, {MOMENTS: broken}), Averages(A, G, {MOMENTS: moments})], [0.5, 0.5])
    assert values.values[0] is None
    assert values.values[1] is not None
    V = torch.randn(outputs, inputs, dtype=torch.float64)
    P, _ = structure.apply([V], [{**values.values[1], MOMENTS: moments}], [0.5])
    torch.testing.assert_close(P[0], V / 0.5)  # without curvature only the damping is left
