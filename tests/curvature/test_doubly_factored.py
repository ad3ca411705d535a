"""Doubly factored input statistics: singular pairs against torch's SVD, rows against the ordinary statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kronfac.curvature import InputFactors, LinearAdapter, adapter_for
from kronfac.curvature.doubly_factored import (
    doubly_factored_statistics,
    input_shape,
    leading_pairs,
    packed_size,
)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]] = {
    "Linear": (lambda: nn.Linear(12, 2), (5, 12), (3, 4)),
    "Linear tokens": (lambda: nn.Linear(6, 2, bias=False), (5, 3, 6), (2, 3)),
    "Conv1d": (lambda: nn.Conv1d(4, 2, 3, padding="same", dilation=2), (5, 4, 7), (4, 3)),
    "Conv2d": (lambda: nn.Conv2d(3, 2, (2, 3), stride=2, padding=(1, 2)), (5, 3, 6, 5), (3, 6)),
    "Conv2d reflect": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (5, 2, 4, 4), (2, 9)),
    "Conv2d one pixel": (lambda: nn.Conv2d(6, 2, 1), (5, 6, 2, 2), (2, 3)),
    "Conv2d one channel": (lambda: nn.Conv2d(1, 2, 2), (5, 1, 3, 3), (2, 2)),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2), (5, 2, 3, 3, 2), (2, 8)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (5, 3, 2, 3), (3, 4)),
}


@pytest.mark.parametrize("shape", [(6, 4, 9), (6, 9, 4), (3, 5, 5), (2, 1, 7), (2, 7, 1)], ids=str)
def test_leading_pairs_are_those_of_the_svd(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    k, psi = leading_pairs(x)
    U, S, Vh = torch.linalg.svd(x)
    signs = (U[:, :, 0] * k).sum(1, keepdim=True).sign()
    torch.testing.assert_close(k, signs * U[:, :, 0] * S[:, :1].sqrt(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(psi, signs * Vh[:, 0] * S[:, :1].sqrt(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e16])
def test_leading_pairs_of_small_and_large_inputs(scale: float) -> None:
    x = torch.randn(4, 5, 6).relu()
    k, psi = leading_pairs(x * scale)
    best = torch.linalg.svdvals(x)[:, 0]
    torch.testing.assert_close(torch.einsum("mi,mij,mj->m", k, x, psi) / scale, best.square(), rtol=1e-5, atol=0)


def test_leading_pairs_without_a_gap_are_still_a_best_approximation() -> None:
    basis = torch.linalg.qr(torch.randn(3, 6, 6, dtype=torch.float64)).Q
    k, psi = leading_pairs(basis)
    rest = torch.linalg.matrix_norm(basis - k[:, :, None] * psi[:, None]).square()
    torch.testing.assert_close(rest, torch.full((3,), 5.0, dtype=torch.float64))  # any unit pair of it leaves 6 - 1


def test_leading_pairs_of_zeros_and_of_nothing() -> None:
    for value in leading_pairs(torch.zeros(2, 3, 4)):
        assert not value.any()
    assert [v.shape for v in leading_pairs(torch.zeros(0, 3, 4))] == [(0, 3), (0, 4)]


def test_values_that_are_not_finite_stay_visible() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 3, 4)
        x[1, 2, 3] = bad
        k, psi = leading_pairs(x)
        assert k[0].isfinite().all()
        assert not (k[1].isfinite().all() and psi[1].isfinite().all())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_the_rows_of_the_ordinary_factor(name: str, sharing: str, masked: bool) -> None:
    make, shape, sides = LAYERS[name]
    layer = make().double()
    adapter = adapter_for(layer)
    assert adapter is not None
    adapter.sharing = sharing
    assert input_shape(adapter) == sides
    x = adapter.layer_input((torch.randn(shape, dtype=torch.float64),), {})
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    rows = torch.cat(list(adapter.input_rows(x, mask)))
    size = adapter.in_features
    A = adapter.input_statistics(None, x, mask)
    torch.testing.assert_close(rows.mT @ rows, A[:size, :size])

    adapter.block, adapter.input_shape = "doubly_factored", sides
    out = doubly_factored_statistics(None, adapter, x, mask)
    out = doubly_factored_statistics(out, adapter, x, mask)
    assert (packed_size(sides),) == adapter.factor_shapes[0] == out.shape
    sums = InputFactors.of(out, sides)
    U, S, Vh = torch.linalg.svd(rows.view(-1, *sides), full_matrices=False)
    for ours, vectors in ((sums.K, U[:, :, 0]), (sums.Psi, Vh[:, 0])):
        torch.testing.assert_close(ours, 2 * (vectors.mT * S[:, 0]) @ vectors, rtol=1e-4, atol=1e-6)
    assert sums.ratio == 2 * len(rows)


def test_pieces_of_a_large_input_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_for(nn.Linear(12, 2, dtype=torch.float64))
    assert adapter is not None
    adapter.block, adapter.input_shape = "doubly_factored", (3, 4)
    x = torch.randn(7, 12, dtype=torch.float64)
    whole = doubly_factored_statistics(None, adapter, x, None)
    monkeypatch.setattr("kronfac.curvature.doubly_factored._CHUNK", 30)
    torch.testing.assert_close(doubly_factored_statistics(None, adapter, x, None), whole)


class OwnSums(LinearAdapter):
    """Changes the statistics and inherits the rows, which are then not those of its statistics."""

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().input_statistics(out, 2 * x, mask)


class OwnRows(OwnSums):
    """Hands over rows that go with them."""

    def input_rows(self, x: Tensor, mask: Tensor | None):  # type: ignore[no-untyped-def]
        yield from super().input_rows(2 * x, mask)


def test_which_layers_cannot_be_doubly_factored() -> None:
    keep_A = (nn.Linear(7, 2), nn.Conv2d(8, 8, 3, groups=2), nn.Embedding(12, 4), nn.LayerNorm(12), nn.Linear(1, 2))
    for layer in keep_A:
        adapter = adapter_for(layer)
        assert adapter is not None
        assert input_shape(adapter) is None, layer
    assert input_shape(OwnSums(nn.Linear(12, 2))) is None
    assert input_shape(OwnRows(nn.Linear(12, 2))) == (3, 4)
