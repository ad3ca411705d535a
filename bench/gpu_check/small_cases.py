"""Every operator on small and awkward inputs, for compute-sanitizer: `python -m bench.gpu_check.small_cases`.

Odd sizes around the edges of tiles, every type, strides, empty tensors, numbers that are not finite; each result is
compared with its reference on the CPU, so that a tool that watched nothing cannot pass for one that found nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kronfac import ops
from kronfac.ops import naive

# Tensors go to the device by Tensor.cuda alone, which a test without a GPU can stand in for.

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
Case = tuple[str, Callable[[], None]]


def cases() -> Iterator[Case]:
    """(name, function that raises AssertionError where the result is wrong)."""
    for dtype in DTYPES:
        for m, d, bias, strided in (
            (1, 1, True, False),
            (37, 65, True, True),
            (300, 130, False, False),
            (0, 3, True, False),
        ):
            yield f"covariance {m}x{d} {dtype}", partial(_covariance, m, d, bias, strided, dtype)
        for window in WINDOWS:
            yield f"conv_covariance {window} {dtype}", partial(_conv_covariance, window, dtype)
        for shape in ((3, 5, 33, 65), (9, 1, 130, 7), (2, 0, 4, 4)):
            yield f"second_moment_ {shape} {dtype}", partial(_second_moment, shape, dtype)
        yield f"kron_precondition {dtype}", partial(_kron, dtype)
        yield f"eigen_precondition {dtype}", partial(_eigen, dtype)
    for dtype, orders in itertools.product(WIDE, ((1, 17, 0, 65, 128, 31), (129, 64, 200))):
        yield f"damped_inverse {orders} {dtype}", partial(_inverse, orders, dtype)
        yield f"damped_eigh {orders} {dtype}", partial(_eigh, orders, dtype)
    for dtype, (m, n) in itertools.product(WIDE, ((1, 1), (7, 1025), (70, 300), (0, 5), (130, 700))):
        yield f"orthogonalize_ {m}x{n} {dtype}", partial(_orthogonalize, m, n, dtype)


# (shape, kernel, stride, padding, dilation, groups, bias)
WINDOWS: tuple[tuple[Any, ...], ...] = (
    ((2, 5, 9, 7), [3, 3], [1, 1], [1, 1], [1, 1], 1, True),
    ((2, 6, 9, 11), [3, 2], [2, 1], [1, 0, 2, 1], [1, 2], 2, False),
    ((3, 3, 17), [5], [1], [2], [1], 1, True),
    ((1, 2, 5, 4, 6), [2, 2, 3], [1, 2, 1], [1, 0, 1], [1, 1, 1], 1, False),
    ((3, 33, 8, 8), [1, 1], [2, 2], [0, 0], [1, 1], 1, True),
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(name: str, found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest entry; narrow results are as coarse as their type."""
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert found.shape == truth.shape, f"{name}: {tuple(found.shape)}, not {tuple(truth.shape)}"
    if found.numel() == 0:
        return
    difference = (found.cpu().double() - truth.double()).abs().max()
    bound = tolerance * max(1e-30, float(truth.double().abs().max()))
    assert float(difference) <= bound, f"{name}: off by {float(difference):.1e}, more than {bound:.1e}"


def _strided(x: Tensor) -> Tensor:
    """The same numbers, every second of a larger tensor whose others are NaN."""
    memory = x.new_full([2 * n + 1 for n in x.shape], float("nan"))
    view = memory[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
    return view.copy_(x)


def _covariance(m: int, d: int, bias: bool, strided: bool, dtype: torch.dtype) -> None:
    x = torch.randn(m, d).to(dtype)
    truth = naive.covariance(x.double(), bias, 0.5)
    on_device = _strided(x.cuda()) if strided else x.cuda()
    _check("covariance", ops.covariance(on_device, bias, 0.5), truth, _wide(dtype))
    out = _strided(torch.eye(d + bias, dtype=_wide(dtype)).cuda())
    ops.covariance_(out, on_device, bias, 0.25, 0.5)
    _check("covariance_", out, truth + 0.25 * torch.eye(d + bias), _wide(dtype))


def _conv_covariance(window: tuple[Any, ...], dtype: torch.dtype) -> None:
    shape, *options = window
    x = torch.randn(shape).to(dtype)
    truth = naive.conv_covariance(x.double(), *options, 0.5)
    for on_device in (x.cuda(), x.cuda().movedim(1, -1).contiguous().movedim(-1, 1)):
        out = ops.conv_covariance(on_device, *options, 0.5)
        _check("conv_covariance", out, truth, _wide(dtype))
        ops.conv_covariance_(out, on_device, *options, 2.0, 0.5)
        _check("conv_covariance_", out, 3 * truth, _wide(dtype))


def _second_moment(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, t, o, d = shape
    g, x = torch.randn(n, t, o).to(dtype), torch.randn(n, t, d).to(dtype)
    truth = torch.ones(o, d + 1, dtype=torch.float64)
    naive.second_moment_(truth, g.double(), x.double(), True, 0.5, 0.1)
    out = torch.ones(o, d + 1, dtype=_wide(dtype)).cuda()
    ops.second_moment_(out, _strided(g.cuda()), x.cuda(), True, 0.5, 0.1)
    _check("second_moment_", out, truth, _wide(dtype))


SHAPES = ((1, 1), (5, 129), (65, 33), (0, 4), (130, 70))


def _lists(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    wide = _wide(dtype)
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
    left = [torch.randn(o, o, dtype=wide) / max(1, o) ** 0.5 for o, _ in SHAPES]
    right = [torch.randn(i, i, dtype=wide) / max(1, i) ** 0.5 for _, i in SHAPES]
    return grads, left, right


def _on_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every second one strided."""
    return [_strided(x.cuda()) if number % 2 else x.cuda() for number, x in enumerate(tensors)]


def _doubles(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[x.double() for x in tensors] for tensors in lists]


def _kron(dtype: torch.dtype) -> None:
    lists = _lists(dtype)
    out, dots = ops.kron_precondition(*map(_on_device, lists))
    truths, expected = naive.kron_precondition(*_doubles(*lists))
    for found, truth in zip(out, truths, strict=True):
        _check("kron_precondition", found, truth, dtype)
    _check("dots", dots, expected, _wide(dtype))


def _eigen(dtype: torch.dtype) -> None:
    lists = (*_lists(dtype), [torch.rand(shape, dtype=_wide(dtype)) for shape in SHAPES])
    damping = torch.full((len(SHAPES),), 0.5, dtype=_wide(dtype))
    out, dots = ops.eigen_precondition(*map(_on_device, lists), damping.cuda())
    truths, expected = naive.eigen_precondition(*_doubles(*lists), damping.double())
    for found, truth in zip(out, truths, strict=True):
        _check("eigen_precondition", found, truth, dtype)
    _check("dots", dots, expected, _wide(dtype))


def _factors(orders: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    roots = [torch.randn(2 * n + 1, n, dtype=torch.float64) for n in orders]
    return [(root.mT @ root / len(root)).to(dtype) for root in roots]


def _inverse(orders: tuple[int, ...], dtype: torch.dtype) -> None:
    factors, damping = _factors(orders, dtype), torch.tensor(0.3, dtype=dtype)
    bad = torch.full((20, 20), float("nan"), dtype=dtype)
    inverses, info = ops.damped_inverse([*_on_device(factors), bad.cuda()], damping.cuda())
    truths, _ = naive.damped_inverse(_doubles(factors)[0], damping.double())
    assert info.tolist() == [0] * len(orders) + [-1], f"damped_inverse: info {info.tolist()}"
    for found, truth in zip(inverses, truths, strict=False):
        _check("damped_inverse", found, truth, dtype)


def _eigh(orders: tuple[int, ...], dtype: torch.dtype) -> None:
    factors, damping = _factors(orders, dtype), torch.tensor(0.3, dtype=dtype)
    bad = torch.full((20, 20), float("nan"), dtype=dtype)
    on_device = [*_on_device(factors), bad.cuda()]
    basis = None
    for _ in range(2):  # cold, then from the basis of before
        values, basis, info = ops.damped_eigh(on_device, damping.cuda(), basis)
        assert info.tolist() == [0] * len(orders) + [-1], f"damped_eigh: info {info.tolist()}"
        for factor, w, q in zip(factors, values, basis, strict=False):
            identity = torch.eye(len(factor), dtype=torch.float64)
            exact, vectors = factor.double() + damping.double() * identity, q.cpu().double()
            _check("damped_eigh", (vectors * w.cpu().double()) @ vectors.mT, exact, dtype)
            _check("basis", vectors.mT @ vectors, identity, dtype)
        basis[-1] = torch.eye(20, dtype=dtype).cuda()


def _orthogonalize(m: int, n: int, dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64)).Q.mT.to(dtype)
    w = torch.randn(n, dtype=dtype)
    truth = w.double().clone()
    expected = naive.orthogonalize_(truth, basis.double(), 2)
    for on_device in (basis.contiguous().cuda(), _strided(basis.cuda())):
        vector = w.cuda()
        coefficients = ops.orthogonalize_(vector, on_device, 2)
        assert (vector.cpu().double() - truth).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5) * n**0.5
        _check("coefficients", coefficients, expected, dtype)


def main() -> int:
    """0: all results are right."""
    torch.manual_seed(0)
    right, wrong = 0, []
    for name, call in cases():
        try:
            call()
        except (AssertionError, RuntimeError) as error:
            wrong.append(f"{name}: {str(error).splitlines()[0]}")
        else:
            right += 1
    torch.cuda.synchronize()
    for message in wrong:
        print(f"small cases: {message}")
    print(f"small cases: {right} right" + (f", {len(wrong)} wrong" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
