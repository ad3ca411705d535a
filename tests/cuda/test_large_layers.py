"""The chains of products of layers that go through cuBLAS, run on the CPU, against the naive references in float64."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kronfac.ops import naive
from tests.cuda import emulation
from tests.ops.cases import DTYPES, arrange

SHAPES = [(66, 40), (20, 30), (66, 40), (1, 7), (20, 30), (20, 30), (65, 1)]


class Run(NamedTuple):
    out: list[Tensor]
    dots: Tensor
    batches: int
    singles: int
    copies: int


def precondition(
    grads: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    eigenvalues: list[Tensor] | None = None,
    damping: Tensor | None = None,
    *,
    together: bool = True,
) -> Run:
    """One list through cuda/large_layers.h: kron_precondition, or eigen_precondition where there are eigenvalues."""
    count, wide = len(grads), left[0].dtype
    out = [torch.full(g.shape, float("nan"), dtype=g.dtype) for g in grads]
    dots = torch.full((count,), float("nan"), dtype=wide)
    layers = list(zip(grads, left, right, eigenvalues or grads, out, strict=True))
    pointers = (ctypes.c_void_p * (5 * count))(*(t.data_ptr() for layer in layers for t in layer))
    strides = emulation.integers(*(step for layer in layers for t in layer[:4] for step in t.stride()))
    sizes = emulation.integers(*(size for g in grads for size in g.shape))
    counts = emulation.integers(0, 0, 0)
    step = damping.stride(0) if damping is not None and damping.dim() else 0
    emulation.library("emulate_large_layers.cpp").emulate_large_layers(
        emulation.TYPES[grads[0].dtype], ctypes.c_bool(wide == torch.float64), ctypes.c_bool(together),
        ctypes.c_int64(count), pointers, strides, sizes, None if damping is None else emulation.pointer(damping),
        ctypes.c_int64(step), emulation.pointer(dots), counts,
    )  # fmt: skip
    return Run(out, dots, *counts)


def matrices(rows: list[int], columns: list[int], dtype: torch.dtype, layout: str) -> list[Tensor]:
    return [
        arrange((torch.randn(m, n, dtype=torch.float64) / n**0.5).to(dtype), layout)
        for m, n in zip(rows, columns, strict=True)
    ]


def compare(run: Run, expected: tuple[list[Tensor], Tensor], dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    for actual, truth in zip(run.out, expected[0], strict=True):
        assert (actual.double() - truth).norm() <= tolerance * truth.norm()
    scale = torch.stack([truth.norm() for truth in expected[0]]) * 20
    assert ((run.dots.double() - expected[1]).abs() <= max(1e-13, 1e-7 if dtype != torch.float64 else 0) * scale).all()


OUTS, INS = (list(sizes) for sizes in zip(*SHAPES, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kron_precondition(dtype: torch.dtype, layout: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = matrices(OUTS, INS, dtype, layout)
    left, right = matrices(OUTS, OUTS, wide, layout), matrices(INS, INS, wide, layout)
    run = precondition(grads, left, right)
    doubles = [[x.double() for x in tensors] for tensors in (grads, left, right)]
    compare(run, naive.kron_precondition(*doubles), dtype)
    assert run.copies == (3 if layout == "strided" else 1 if dtype != wide else 0) * len(SHAPES)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eigen_precondition(dtype: torch.dtype, layout: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = matrices(OUTS, INS, dtype, layout)
    left, right = (
        [arrange(torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q.to(wide), layout) for n in sizes]
        for sizes in (OUTS, INS)
    )
    eigenvalues = [torch.rand(shape[::-1], dtype=wide).T for shape in SHAPES]
    damping = torch.linspace(0.5, 1.0, len(SHAPES), dtype=wide)
    run = precondition(grads, left, right, eigenvalues, damping)
    doubles = [[x.double() for x in tensors] for tensors in (grads, left, right, eigenvalues)]
    compare(run, naive.eigen_precondition(*doubles, damping.double()), dtype)


def test_equal_shapes_go_in_one_call() -> None:
    grads = matrices(OUTS, INS, torch.float64, "contiguous")
    left, right = (matrices(sizes, sizes, torch.float64, "contiguous") for sizes in (OUTS, INS))
    run, alone = (precondition(grads, left, right, together=together) for together in (True, False))
    # Two shapes that come several times and two that do not, in two products each.
    assert (run.batches, run.singles, run.copies) == (4, 4, 0)
    assert (alone.batches, alone.singles, alone.copies) == (0, 2 * len(SHAPES), 0)
    assert all(torch.equal(x, y) for x, y in zip(run.out, alone.out, strict=True))
    assert torch.equal(run.dots, alone.dots)


def test_an_address_off_the_grid_of_16_bytes_stays_by_itself() -> None:
    n = 20
    memory = torch.randn(n * n + 1)
    odd = memory[1:].view(n, n)
    grads, left, right = ([torch.randn(n, n) for _ in range(3)] for _ in range(3))
    run = precondition(grads, [*left[:2], odd], right)
    assert (run.batches, run.singles) == (2, 1)
    doubles = [[x.double() for x in tensors] for tensors in (grads, [*left[:2], odd], right)]
    compare(run, naive.kron_precondition(*doubles), torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_damping_that_makes_no_sense_makes_nan(bad: float) -> None:
    ones = [torch.ones(3, 3)] * 2
    run = precondition(ones, ones, ones, ones, torch.tensor([0.5, bad]))
    assert run.out[0].isfinite().all()
    assert run.dots[0].isfinite()
    assert run.out[1].isnan().all()
    assert run.dots[1].isnan()


def test_which_layers_are_large() -> None:
    large = emulation.library("emulate_large_layers.cpp").large_layer_of
    large.restype = ctypes.c_bool
    shapes = [(512, 4608), (1024, 512), (256, 2304), (1000, 2049), (256, 1024), (64, 65536), (2**20, 2**20)]
    assert [large(*map(ctypes.c_int64, shape)) for shape in shapes] == [True, True, True, True, False, False, True]
