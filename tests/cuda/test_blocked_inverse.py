"""damped_inverse of large matrices with cuBLAS' products, run on the CPU with small blocks, against LAPACK."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from kronfac.ops import naive
from tests.cuda import emulation
from tests.cuda.test_damped_inverse import factor

BLOCK, TILE = 128, 64
ORDERS = (250, 250, 193, 192, 192, 192, 160, 129, 65, 64, 30)
"""Matrices of one order in one call; last tiles of all heights, of one row, whole; one or two parts of last pivots."""


def invert(
    factors: list[Tensor], damping: Tensor, block: int = BLOCK, tile: int = TILE
) -> tuple[list[Tensor], Tensor, int]:
    """One batch, factors by descending order; also the number of calls for products."""
    count = len(factors)
    inverses = [f.new_full(f.shape, float("nan")) for f in factors]
    info = torch.zeros(count, dtype=torch.int32)

    def pointers(tensors: list[Tensor]) -> Any:
        return (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors))

    strides = emulation.integers(*(stride for f in factors for stride in f.stride()))
    function = emulation.library("emulate_blocked_inverse.cpp").emulate_blocked_inverse
    function.restype = ctypes.c_int64
    calls: int = function(
        emulation.TYPES[damping.dtype], block, tile, count, pointers(factors), strides,
        emulation.integers(*(len(f) for f in factors)), pointers(inverses), emulation.pointer(damping),
        ctypes.c_int64(damping.stride(0) if damping.dim() else 0), emulation.pointer(info),
    )  # fmt: skip
    return inverses, info, calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(dtype: torch.dtype) -> None:
    factors = [factor(n, dtype) for n in ORDERS]
    damping = torch.linspace(0.01, 0.3, len(ORDERS), dtype=dtype)
    inverses, info, calls = invert(factors, damping)
    expected, _ = naive.damped_inverse([f.double() for f in factors], damping.double())
    assert info.tolist() == [0] * len(ORDERS)
    for inverse, truth in zip(inverses, expected, strict=True):
        assert torch.equal(inverse, inverse.T)
        error = (inverse.double() - truth).norm() / truth.norm()
        assert error <= (1e-12 if dtype == torch.float64 else 2e-5)
    # Of each order: Y for each 64 pivots, U where more follow in the step, and in each step whole tiles, flat ones and
    # the corner where there are any.
    counts = {250: 4 + 2 + 2 * 3, 193: 4 + 2 + 2 * 3, 192: 3 + 1 + 2, 160: 3 + 1 + 2 * 3, 129: 3 + 1 + 2 * 3}
    assert calls == sum(counts.values()) + (2 + 1 + 3) + (1 + 1) + (1 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sizes_in_use(dtype: torch.dtype) -> None:
    f, damping = factor(300, dtype), torch.tensor(0.1, dtype=dtype)
    (inverse,), info, _ = invert([f], damping, 256, 256)
    (truth,), _ = naive.damped_inverse([f.double()], damping.double())
    assert info.tolist() == [0]
    assert (inverse.double() - truth).norm() <= (1e-12 if dtype == torch.float64 else 2e-5) * truth.norm()


@pytest.mark.parametrize("spectrum", ["even", "smooth"])
def test_about_as_accurate_as_lapack(spectrum: str) -> None:
    n = 300
    if spectrum == "even":
        q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
        f = ((q * torch.logspace(0, -4, n, dtype=torch.float64)) @ q.T).float()
    else:  # neighbours are alike: each block of pivots is as badly conditioned as the whole
        at = torch.arange(n, dtype=torch.float64)
        f = (torch.exp(-((at[:, None] - at) ** 2) / 200) + 1e-3 * torch.eye(n, dtype=torch.float64)).float()

    def residual(inverse: Tensor) -> float:
        return (f.double() @ inverse.double() - torch.eye(n, dtype=torch.float64)).abs().max().item()

    lapack = residual(torch.cholesky_inverse(torch.linalg.cholesky(f)))
    assert residual(invert([f], torch.tensor(0.0), 256, 256)[0][0]) <= 10 * lapack
    assert residual(emulation.damped_inverse([f], torch.tensor(0.0))[0][0]) <= 10 * lapack


def test_bad_matrices_are_named_and_spoil_nothing() -> None:
    orders = (250, 250, 250, 250, 192)
    factors = [factor(n, torch.float64) for n in orders]
    damping = torch.tensor(0.1, dtype=torch.float64)
    good = invert(factors, damping)[0]
    factors[0][-1, -1] = -5.0  # the last leading minor
    factors[1][70, 70] = -50.0  # in the second block
    factors[2][9, 3] = float("inf")
    factors[4][0, 0] = -1.0
    inverses, info, _ = invert(factors, damping)
    assert info.tolist() == [250, 71, -1, 0, 1]
    assert all(inverses[i].isnan().all() for i in (0, 1, 2, 4))
    assert torch.equal(inverses[3], good[3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_damping_is_told_in_info(bad: float) -> None:
    inverses, info, _ = invert([factor(n, torch.float32) for n in (140, 129)], torch.tensor([0.1, bad]))
    assert info.tolist() == [0, -1]
    assert inverses[0].isfinite().all()
    assert inverses[1].isnan().all()


def test_an_inverse_beyond_the_type_is_told_in_info() -> None:
    (inverse,), info, _ = invert([torch.eye(150) * 1e-39], torch.tensor(0.0))
    assert info.tolist() == [-1]
    assert inverse.isnan().all()


def test_any_strides() -> None:
    n = 150
    f = factor(n, torch.float64)
    memory = torch.full((2 * n, 3 * n), float("nan"), dtype=torch.float64)
    view = memory[::2, ::3].T
    view.copy_(f)
    damping = torch.tensor(0.1, dtype=torch.float64)
    assert torch.equal(invert([view], damping)[0][0], invert([f], damping)[0][0])
