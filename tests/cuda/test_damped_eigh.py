"""The GPU's kernels of damped_eigh, run on the CPU, against LAPACK in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import emulation_damped_eigh as emulation

DTYPES = [torch.float32, torch.float64]
CLASSES = [(32, 31, 17, 16, 5, 3, 2, 1), (64, 63, 33), (112, 65)]


def factor(n: int, dtype: torch.dtype = torch.float32, rank: int | None = None) -> Tensor:
    x = torch.randn(2 * n + 3 if rank is None else rank, n, dtype=torch.float64)
    return (x.mT @ x / max(1, len(x))).to(dtype)


def with_spectrum(values: Tensor, dtype: torch.dtype) -> Tensor:
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    f = (q * values.double()) @ q.mT
    return ((f + f.mT) / 2).to(dtype)


def spoiled_above(f: Tensor) -> Tensor:
    """NaN in the strict upper triangle, which no kernel may read."""
    return f.tril() + torch.full_like(f, float("nan")).triu(1)


def assert_decomposition(f: Tensor, damping: float, values: Tensor, vectors: Tensor) -> None:
    """Residual, orthogonality and eigenvalues of F + damping I, f its lower triangle."""
    n, q, eps = len(f), vectors.double(), torch.finfo(f.dtype).eps
    exact = f.double().tril() + f.double().tril(-1).mT
    norm = float(torch.linalg.matrix_norm(exact, 2)) + damping
    identity = torch.eye(n, dtype=torch.float64)
    assert vectors.stride() == (1, n)
    assert bool((values.diff() >= 0).all())
    assert bool((values >= torch.tensor(damping, dtype=f.dtype)).all())
    expected = torch.linalg.eigvalsh(exact).clamp(min=0) + damping
    # The judge, LAPACK in double, errs as well.
    bound = 3 * eps * norm + (0.3 if f.dtype == torch.float32 else 3) * eps * n**0.5 * norm
    assert float((values.double() - expected).abs().max()) <= bound
    assert float(((exact + damping * identity) @ q - q * values.double()).norm(dim=0).max()) <= bound
    assert float((q.mT @ q - identity).norm(dim=0).max()) <= 3 * eps + (0.3 if eps > 1e-10 else 3) * eps * n**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("orders", CLASSES)
def test_small_orders(orders: tuple[int, ...], dtype: torch.dtype) -> None:
    factors = [factor(n, dtype) for n in orders]
    damping = torch.linspace(0.0, 0.3, len(orders), dtype=dtype)
    values, vectors, info = emulation.small([spoiled_above(f) for f in factors], damping)
    assert info.tolist() == [0] * len(orders)
    for f, shift, a, q in zip(factors, damping.tolist(), values, vectors, strict=True):
        assert_decomposition(f, shift, a, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [12, 41, 64])
def test_spectra(n: int, dtype: torch.dtype) -> None:
    wide = dtype == torch.float64
    kinds = [
        factor(n, dtype, rank=n // 2),
        torch.eye(n, dtype=dtype),
        torch.zeros(n, n, dtype=dtype),
        torch.ones(n, n, dtype=dtype),
        torch.diag(torch.arange(n, 0, -1, dtype=dtype)),
        torch.diag(torch.logspace(0, -12, n, dtype=dtype)),
        with_spectrum(torch.logspace(-8, 0, n), dtype),
        with_spectrum(torch.tensor([1.0, 1.0, 1.0, 2.0]).repeat(n // 4 + 1)[:n], dtype),
        with_spectrum(1 + 1e-6 * torch.rand(n), dtype),
        with_spectrum(torch.cat([torch.full((n - 1,), 1e-7), torch.ones(1)]), dtype),
        torch.block_diag(factor(n // 2, dtype), torch.eye(n - n // 2, dtype=dtype)),
        factor(n, dtype) * (1e-300 if wide else 1e-30),
        factor(n, dtype) * (1e300 if wide else 1e30),
        factor(n, dtype) * torch.finfo(dtype).smallest_normal,
    ]
    values, vectors, info = emulation.small(kinds, torch.tensor(0.0, dtype=dtype))
    assert info.tolist() == [0] * len(kinds)
    for f, a, q in zip(kinds, values, vectors, strict=True):
        scale = float(f.abs().max()) or 1.0  # squares in the judge itself must not overflow
        assert_decomposition((f.double() / scale).to(dtype), 0.0, (a.double() / scale).to(dtype), q)


def test_orders_for_the_shared_memory_of_devices() -> None:
    assert emulation.small_order(163 << 10) == 112  # sm_80
    assert emulation.small_order(99 << 10) == 89  # sm_86, sm_89, sm_120
    for order, blocks in ((32, 8), (64, 3)):
        assert emulation.shared_memory(order) * blocks <= 164 << 10


@pytest.mark.parametrize("n", [6, 40])
def test_bad_matrices_are_reported_and_leave_the_others_alone(n: int) -> None:
    good = [factor(n) for _ in range(3)]
    with_nan, with_inf = factor(n), factor(n)
    with_nan[n - 1, 0] = torch.nan
    with_inf[n // 2, n // 2] = -torch.inf
    damping = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, torch.nan, -1.0])
    values, vectors, info = emulation.small([good[0], with_nan, good[1], with_inf, good[2], good[0], good[1]], damping)
    assert info.tolist() == [0, -1, 0, -1, 0, -1, -1]
    alone = emulation.small(good, torch.tensor(0.1))
    for i, at in enumerate((0, 2, 4)):
        assert torch.equal(values[at], alone[0][i])
        assert torch.equal(vectors[at], alone[1][i])
    for at in (1, 3, 5, 6):
        assert values[at].isnan().all()
        assert vectors[at].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_overflows_the_type_is_reported(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values, vectors, info = emulation.small([torch.full((4, 4), largest, dtype=dtype)], torch.tensor(0.0, dtype=dtype))
    assert info.tolist() == [1]
    assert values[0].isnan().all()
    assert vectors[0].isnan().all()
    (values, _, info), _ = emulation.large(
        [torch.full((120, 120), largest, dtype=dtype)], torch.tensor(0.0, dtype=dtype)
    )
    assert info.tolist() == [1]
    assert values[0].isnan().all()


@pytest.mark.parametrize("n", [30, 150])
def test_any_strides(n: int) -> None:
    f = spoiled_above(factor(n, torch.float64))
    memory = torch.full((2 * n, 3 * n), torch.nan, dtype=torch.float64)
    damping = torch.tensor(0.1, dtype=torch.float64)

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors, _ = emulation.small([x], damping) if n < 100 else emulation.large([x], damping)[0]
        return values[0], vectors[0]

    expected = solve(f)
    for view in (memory[::2, ::3], memory[: 2 * n : 2, : 3 * n : 3].mT):
        view.copy_(f)
        for a, b in zip(solve(view), expected, strict=True):
            assert torch.equal(a, b)


def test_eigenvalues_are_floored_at_the_damping() -> None:
    indefinite = torch.diag(torch.tensor([-3.0, 1.0]))
    assert emulation.small([indefinite], torch.tensor(0.5))[0][0].tolist() == [0.5, 1.5]
    deficient = factor(130, rank=5)
    assert bool((torch.linalg.eigvalsh(deficient) < 0).any())  # what the floor is for
    (values, _, _), _ = emulation.large([deficient], torch.tensor(0.25))
    assert bool((values[0] >= 0.25).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_around_a_library(dtype: torch.dtype) -> None:
    orders = (200, 200, 129, 113, 113, 128, 161)
    factors = [factor(n, dtype) for n in orders]
    factors[1][199, 3] = torch.inf
    factors[5] *= 1e30 if dtype == torch.float32 else 1e300
    damping = torch.linspace(0.0, 0.3, len(orders), dtype=dtype)
    damping[4] = torch.nan
    (values, vectors, info), given = emulation.large([spoiled_above(f) for f in factors], damping, failed=2)
    assert info.tolist() == [0, -1, 1, 0, -1, 0, 0]
    for i in (1, 2, 4):
        assert values[i].isnan().all()
        assert vectors[i].isnan().all()
    for i in (1, 4):
        assert torch.equal(given[i], torch.eye(orders[i], dtype=dtype))
    for i in (0, 3, 5, 6):
        assert torch.equal(given[i], given[i].mT)
        assert 0.5 <= float(given[i].abs().max()) < 1
        scale = float(factors[i].abs().max())
        shift = float(damping[i]) / scale
        scaled = (values[i].double() / scale).to(dtype)
        exact = (factors[i].double() / scale).tril()
        exact = exact + exact.tril(-1).mT + shift * torch.eye(orders[i], dtype=torch.float64)
        q = vectors[i].double()
        assert float((exact @ q - q * scaled.double()).abs().max()) <= 20 * torch.finfo(dtype).eps * orders[i] ** 0.5


def test_a_library_that_returns_nan_is_not_believed() -> None:
    def broken(f: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(f)
        values[len(f) // 2] = torch.nan
        return values, vectors

    (values, vectors, info), _ = emulation.large([factor(130)], torch.tensor(0.1), broken)
    assert info.tolist() == [1]
    assert values[0].isnan().all()
    assert vectors[0].isnan().all()
