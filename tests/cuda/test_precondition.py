"""The GPU's products behind kron_precondition and eigen_precondition, run on the CPU in the same chains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronfac.ops import naive
from tests.cuda import emulation
from tests.ops.cases import DTYPES, arrange

SHAPES = [(130, 70), (5, 129), (64, 64), (1, 1), (17, 300)]


def matrices(rows: list[int], columns: list[int], dtype: torch.dtype, layout: str) -> list[Tensor]:
    return [
        arrange((torch.randn(m, n, dtype=torch.float64) / n**0.5).to(dtype), layout)
        for m, n in zip(rows, columns, strict=True)
    ]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kron_precondition(dtype: torch.dtype, layout: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs, ins = (list(sizes) for sizes in zip(*SHAPES, strict=True))
    grads = matrices(outs, ins, dtype, layout)
    left, right = matrices(outs, outs, wide, layout), matrices(ins, ins, wide, layout)
    inner = [torch.full(shape, float("nan"), dtype=wide) for shape in SHAPES]
    out = [torch.full(shape, float("nan"), dtype=dtype) for shape in SHAPES]
    zero = torch.zeros((), dtype=wide)
    emulation.product("store", left, grads, inner, grads, zero, dtype, b_grad=True)
    dots = emulation.product("dot", inner, right, out, grads, zero, dtype)

    doubles = [[x.double() for x in tensors] for tensors in (grads, left, right)]
    expected, expected_dots = naive.kron_precondition(*doubles)
    compare(out, expected, dots, expected_dots, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eigen_precondition(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs, ins = (list(sizes) for sizes in zip(*SHAPES, strict=True))
    grads = matrices(outs, ins, dtype, "contiguous")
    left, right = (
        [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q.to(wide) for n in sizes] for sizes in (outs, ins)
    )
    eigenvalues = [torch.rand(shape[::-1], dtype=wide).T for shape in SHAPES]
    damping = torch.linspace(0.5, 1.0, len(SHAPES), dtype=wide)
    inner, middle = ([torch.full(shape, float("nan"), dtype=wide) for shape in SHAPES] for _ in range(2))
    out = [torch.full(shape, float("nan"), dtype=dtype) for shape in SHAPES]
    emulation.product("store", [q.T for q in left], grads, inner, grads, damping, dtype, b_grad=True)
    dots = emulation.product("divide", inner, right, middle, eigenvalues, damping, dtype)
    emulation.product("store", left, middle, inner, grads, damping, dtype)
    emulation.product("rounded", inner, [q.T for q in right], out, grads, damping, dtype)

    doubles = [[x.double() for x in tensors] for tensors in (grads, left, right, eigenvalues)]
    expected, expected_dots = naive.eigen_precondition(*doubles, damping.double())
    compare(out, expected, dots, expected_dots, dtype)


def compare(out: list[Tensor], expected: list[Tensor], dots: Tensor, expected_dots: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    for actual, truth in zip(out, expected, strict=True):
        assert (actual.double() - truth).norm() <= tolerance * truth.norm()
    scale = torch.stack([truth.norm() for truth in expected]) * 20
    assert ((dots.double() - expected_dots).abs() <= max(1e-13, 1e-7 if dtype != torch.float64 else 0) * scale).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_damping_that_makes_no_sense_makes_nan(bad: float) -> None:
    one, middle = [torch.ones(3, 3)] * 2, [torch.zeros(3, 3) for _ in range(2)]
    dots = emulation.product("divide", one, one, middle, one, torch.tensor([0.5, bad]), torch.float32)
    assert middle[0].isfinite().all()
    assert dots[0].isfinite()
    assert middle[1].isnan().all()
    assert dots[1].isnan()
