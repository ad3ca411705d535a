"""Layers and matrices large enough for cuBLAS, on a GPU: with full float32, with TF32, and in a graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kronfac import _library, ops
from kronfac.ops import naive

pytestmark = pytest.mark.skipif(
    "_ops_cuda" not in _library.LOADED or not torch.cuda.is_available(), reason="no GPU, or no operators for it"
)

SHAPES = [(512, 1100), (40, 30), (512, 1100), (700, 801), (130, 4100)]
"""Two large layers that go in one call, one by itself, and small ones between them."""


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device("cuda"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def layers(dtype: torch.dtype, transposed: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients, left and right matrices; transposed ones, and an address that is no multiple of 16 bytes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
    outs, ins = zip(*SHAPES, strict=True)
    left, right = ([(torch.randn(n, n, dtype=torch.float64) / n**0.5).to(wide) for n in sizes] for sizes in (outs, ins))
    if transposed:
        grads, right = [g.mT.contiguous().mT for g in grads], [r.mT.contiguous().mT for r in right]
        left[2] = left[2].new_zeros(512 * 512 + 1)[1:].view(512, 512).copy_(left[2])
    return grads, left, right


def doubles(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[t.double() for t in tensors] for tensors in lists]


def check(actual: tuple[list[Tensor], Tensor], expected: tuple[list[Tensor], Tensor], tolerance: float) -> None:
    for result, truth in zip(actual[0], expected[0], strict=True):
        assert (result.double() - truth).norm() <= tolerance * truth.norm()
    scale = torch.stack([truth.norm() for truth in expected[0]]) * torch.tensor([m * n for m, n in SHAPES]) ** 0.5
    assert ((actual[1].double() - expected[1]).abs() <= tolerance * scale).all()


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_kron_precondition(dtype: torch.dtype, transposed: bool) -> None:
    grads, left, right = layers(dtype, transposed)
    expected = naive.kron_precondition(*doubles(grads, left, right))
    check(ops.kron_precondition(grads, left, right), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_eigen_precondition(dtype: torch.dtype, transposed: bool) -> None:
    grads, left, right = layers(dtype, transposed)
    spectra = [torch.rand(shape[::-1], dtype=left[0].dtype).mT for shape in SHAPES]
    damping = torch.linspace(0.5, 1.0, len(SHAPES), dtype=left[0].dtype)
    expected = naive.eigen_precondition(*doubles(grads, left, right, spectra), damping.double())
    check(ops.eigen_precondition(grads, left, right, spectra, damping), expected, TOLERANCES[dtype])


def test_tf32_only_where_torch_has_it() -> None:
    grads, left, right = layers(torch.float32, False)
    expected = naive.kron_precondition(*doubles(grads, left, right))
    torch.backends.cuda.matmul.allow_tf32 = True
    actual = ops.kron_precondition(grads, left, right)
    check(actual, expected, 2e-3)
    errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(actual[0], expected[0], strict=True)]
    assert min(errors[i] for i in (0, 2, 3)) > 1e-5  # cuBLAS took it
    assert max(errors[i] for i in (1, 4)) < 1e-5  # our own kernels never do


def covariances(orders: list[int], dtype: torch.dtype) -> list[Tensor]:
    samples = [torch.randn(2 * n, n, dtype=torch.float64) for n in orders]
    return [(x.mT @ x / len(x)).to(dtype).tril() + torch.full((n, n), torch.nan, dtype=dtype).triu(1)
            for x, n in zip(samples, orders, strict=True)]  # fmt: skip


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_inverse(dtype: torch.dtype, tf32: bool) -> None:
    orders = [768, 64, 1030, 300, 1030, 897, 1024]
    factors, damping = covariances(orders, dtype), torch.linspace(0.1, 0.3, len(orders), dtype=dtype)
    expected, _ = naive.damped_inverse([f.double() for f in factors], damping.double())
    torch.backends.cuda.matmul.allow_tf32 = tf32  # which an inverse does not follow
    inverses, info = ops.damped_inverse(factors, damping)
    assert info.tolist() == [0] * len(orders)
    for inverse, truth in zip(inverses, expected, strict=True):
        assert torch.equal(inverse, inverse.mT)
        assert (inverse.double() - truth).norm() <= (1e-12 if dtype == torch.float64 else 2e-5) * truth.norm()
    assert torch.backends.cuda.matmul.allow_tf32 == tf32


def test_bad_matrices_spoil_nothing() -> None:
    orders = [900, 900, 900, 900]
    factors, damping = covariances(orders, torch.float64), torch.tensor(0.1, dtype=torch.float64)
    good = ops.damped_inverse(factors, damping)[0]
    factors[0][-1, -1], factors[1][300, 300], factors[2][9, 3] = -5.0, -50.0, torch.inf
    inverses, info = ops.damped_inverse(factors, damping)
    assert info.tolist() == [900, 301, -1, 0]
    assert all(inverse.isnan().all() for inverse in inverses[:3])
    assert torch.equal(inverses[3], good[3])


def test_nothing_waits_and_a_graph_gives_the_same_bits() -> None:
    grads, left, right = layers(torch.float32, False)
    factors, damping = covariances([1030, 1030, 800], torch.float32), torch.tensor(0.1)

    def call() -> list[Tensor]:
        out, dots = ops.kron_precondition(grads, left, right)
        inverses, info = ops.damped_inverse(factors, damping)
        return [*out, dots, *inverses, info]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = call()  # cuBLAS makes its handle and workspace, which no graph can hold
        side.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    for results in (again, captured):
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
