"""What is only to be seen on a GPU: streams, graphs, waiting for the device, what is told instead of raised.

The results themselves are those of tests/ops under `KRONFAC_DEVICE=cuda`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kronfac import _library, ops
from kronfac.ops import naive
from tests.ops.cases import covariance_error

pytestmark = pytest.mark.skipif(
    "_ops_cuda" not in _library.LOADED or not torch.cuda.is_available(), reason="no GPU, or no operators for it"
)


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()


def factor(n: int) -> Tensor:
    x = torch.randn(2 * n, n)
    return x.mT @ x / (2 * n)


SIZES = (5, 40, 129, 300)


def covariance() -> Callable[[], list[Tensor]]:
    out, x = torch.zeros(301, 301), torch.randn(1000, 300)
    return lambda: [*[ops.covariance(x, True, 0.5)], *_filled(out, lambda: ops.covariance_(out, x, True, 0.5, 0.5))]


def conv_covariance() -> Callable[[], list[Tensor]]:
    x, window = torch.randn(4, 8, 14, 14), ([3, 3], [1, 1], [1, 1], [1, 1])
    out = torch.zeros(72, 72)
    return lambda: [ops.conv_covariance(x, *window), *_filled(out, lambda: ops.conv_covariance_(out, x, *window))]


def second_moment() -> Callable[[], list[Tensor]]:
    out, g, x = torch.zeros(40, 71), torch.randn(9, 5, 40), torch.randn(9, 5, 70)
    return lambda: _filled(out, lambda: ops.second_moment_(out, g, x, True, 0.5, 0.1))


def damped_inverse() -> Callable[[], list[Tensor]]:
    factors, damping = [factor(n) for n in SIZES], torch.tensor(0.1)

    def call() -> list[Tensor]:
        inverses, info = ops.damped_inverse(factors, damping)
        return [*inverses, info]

    return call


def preconditioners() -> Callable[[], list[Tensor]]:
    grads = [torch.randn(n, n + 7) for n in SIZES]
    left, right = [factor(n) for n in SIZES], [factor(n + 7) for n in SIZES]
    spectra, damping = [torch.rand(n, n + 7) for n in SIZES], torch.tensor(0.1)

    def call() -> list[Tensor]:
        out, dots = ops.kron_precondition(grads, left, right)
        eigen_out, eigen_dots = ops.eigen_precondition(grads, left, right, spectra, damping)
        return [*out, dots, *eigen_out, eigen_dots]

    return call


def orthogonalize() -> Callable[[], list[Tensor]]:
    basis, start = torch.linalg.qr(torch.randn(5000, 20)).Q.mT.contiguous(), torch.randn(5000)
    w = start.clone()

    def call() -> list[Tensor]:
        w.copy_(start)
        return [ops.orthogonalize_(w, basis), w]

    return call


def _filled(out: Tensor, call: Callable[[], Any]) -> list[Tensor]:
    out.fill_(1.0)
    call()
    return [out]


CALLS = [covariance, conv_covariance, second_moment, damped_inverse, preconditioners, orthogonalize]


@pytest.mark.parametrize("make", CALLS)
def test_nothing_waits_for_the_device(make: Callable[[], Callable[[], list[Tensor]]]) -> None:
    """Waits of torch raise here; those of the operators would break the capture of a graph, below."""
    call = make()
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", CALLS)
def test_a_graph_of_it_gives_the_same_bits(make: Callable[[], Callable[[], list[Tensor]]]) -> None:
    call = make()
    expected = [tensor.clone() for tensor in call()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for tensor in results:
        tensor.fill_(77)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("make", CALLS)
def test_work_goes_to_the_current_stream(make: Callable[[], Callable[[], list[Tensor]]]) -> None:
    """Behind a long product on a stream of its own; on another stream its result would not be there yet."""
    call = make()
    expected = [tensor.clone() for tensor in call()]
    torch.cuda.synchronize()
    side, big = torch.cuda.Stream(), torch.randn(4096, 4096)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(10):
            big = (big @ big).clamp_(-1, 1)
        results = [tensor.clone() for tensor in call()]
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["damped_inverse", "damped_eigh"])
def test_bad_damping_is_told_in_info(name: str, bad: float) -> None:
    factors = [factor(n) for n in (6, 40, 200)]
    *results, info = getattr(ops, name)(factors, torch.tensor([0.1, bad, 0.1]))
    assert info.tolist() == [0, -1, 0]
    for tensors in results:
        assert tensors[0].isfinite().all()
        assert tensors[1].isnan().all()
        assert tensors[2].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_damping_of_a_preconditioner_makes_nan(bad: float) -> None:
    grads, eyes = [torch.ones(3, 3)] * 2, [torch.eye(3)] * 2
    out, dots = ops.eigen_precondition(grads, eyes, eyes, grads, torch.tensor([0.5, bad]))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert dots.isnan().tolist() == [False, True]


def test_a_tensor_of_the_cpu_among_them_is_named() -> None:
    x = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match=r"kronfac::covariance_: out: expected the device of x"):
        ops.covariance_(torch.zeros(3, 3, device="cpu"), x)
    with pytest.raises(RuntimeError, match=r"kronfac::kron_precondition: "):
        ops.kron_precondition([torch.ones(2, 3)], [torch.eye(2, device="cpu")], [torch.eye(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["direct", "shift"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 20, 9, 11), ([3, 3], [1, 1], [2, 0, 1, 3], [2, 1])),
        ((16, 5, 8, 8), ([8, 7], [1, 1], [0, 0], [1, 1])),  # a kernel nearly as large as the map
        ((8, 3, 33, 32), ([7, 7], [2, 2], [3, 3], [1, 1])),
        ((5, 4, 500), ([9], [1], [4], [1])),
        ((2, 3, 9, 10, 11), ([3, 2, 3], [1, 2, 1], [1, 1, 1], [1, 1, 2])),
    ],
)
def test_both_forms_of_conv_covariance(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], options: tuple[Any, ...], form: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("KRONFAC_CONV_COVARIANCE", form)
    x = torch.randn(shape).to(dtype)
    result = ops.conv_covariance(x, *options, bias=True, scale=0.5)
    expected = naive.conv_covariance(x.double().cpu(), *options, bias=True, scale=0.5)
    assert torch.equal(result, result.mT)
    assert covariance_error(result.cpu(), expected) <= (1e-13 if dtype == torch.float64 else 1e-5)


def test_a_form_of_conv_covariance_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRONFAC_CONV_COVARIANCE", "shifts")
    with pytest.raises(RuntimeError, match="KRONFAC_CONV_COVARIANCE: expected direct"):
        ops.conv_covariance(torch.ones(1, 1, 4), [3], [1], [0], [1])


@pytest.mark.parametrize("form", ["TF32", "float32"])
def test_float32_follows_the_setting_of_torch(form: str) -> None:
    """Rounded to TF32 where torch's products are, and to the last digits where they are not."""
    x = torch.randn(4096, 256)
    exact = naive.covariance(x.double().cpu(), False, 1.0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = form == "TF32"
    try:
        error = covariance_error(ops.covariance(x).cpu(), exact)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert 1e-6 < error < 1e-3 if form == "TF32" else error <= 1e-6


def test_large_offsets() -> None:
    """Entries of x further than 2^31 elements from the first."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 10 GB of device memory")
    rows = (1 << 31) // 512 + 3
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, 1024).to(torch.bfloat16)
    last = x[-3:].double()
    result = ops.covariance(x[:, ::8])
    assert (result.double() - last[:, ::8].mT @ last[:, ::8]).abs().max() <= 1e-4
