"""kronfac::damped_inverse against float64 and against torch's own Cholesky."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from kronfac.ops import damped_inverse, naive

DTYPES = [torch.float32, torch.float64]


def factor(n: int, dtype: torch.dtype = torch.float32, rank: int | None = None) -> Tensor:
    """Positive semi-definite, eigenvalues of order 1."""
    x = torch.randn(n if rank is None else rank, n, dtype=torch.float64)
    return (x.mT @ x / max(1, len(x))).to(dtype)


def spectrum_matrix(n: int, smallest: float, seed: int) -> Tensor:
    """Symmetric float64 matrix with eigenvalues spread geometrically over [smallest, 1]."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    matrix = (q * torch.logspace(0, torch.tensor(smallest).log10().item(), n, dtype=torch.float64)) @ q.mT
    return (matrix + matrix.mT) / 2


def residual(matrix: Tensor, inverse: Tensor) -> float:
    identity = torch.eye(len(matrix), dtype=torch.float64)
    return float((matrix @ inverse.double() - identity).abs().max())


def assert_inverse(f: Tensor, damping: float, inverse: Tensor) -> None:
    lower = f.double().tril()
    matrix = lower + lower.tril(-1).mT + damping * torch.eye(len(f), dtype=torch.float64)
    if f.numel() == 0:
        return
    eigenvalues = torch.linalg.eigvalsh(matrix)
    condition = float(eigenvalues[-1] / eigenvalues[0])
    # A symmetric inverse in precision eps has residual of order eps * condition.
    assert residual(matrix, inverse) <= 8 * torch.finfo(f.dtype).eps * max(condition, len(f) ** 0.5)
    assert torch.equal(inverse, inverse.mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 63, 64, 65, 127, 128, 129, 200, 385])
def test_every_kind_of_size(n: int, dtype: torch.dtype) -> None:
    f = factor(n, dtype)
    (inverse,), info = damped_inverse([f], torch.tensor(0.1, dtype=dtype))
    assert info.tolist() == [0]
    assert info.dtype == torch.int32
    assert inverse.dtype == dtype
    assert inverse.shape == (n, n)
    assert inverse.is_contiguous()
    assert_inverse(f, 0.1, inverse)


@pytest.mark.parametrize("n", [8, 33, 64, 100, 128, 129, 192, 256, 400, 512, 1024, 1601])
def test_accuracy_is_at_least_about_lapacks(n: int) -> None:
    ours, lapack = [], []
    for seed in range(8 if n <= 256 else 2):
        # The damping is part of the matrix: F alone is nearly singular, F + damping I has condition 1e4 and norm 1.
        damping = 5e-5
        f = (spectrum_matrix(n, 1e-4, seed) - damping * torch.eye(n, dtype=torch.float64)).float()
        shift = torch.tensor(damping)
        exact = f.double() + shift.double() * torch.eye(n, dtype=torch.float64)
        (inverse,), info = damped_inverse([f], shift)
        assert info.tolist() == [0]
        ours.append(residual(exact, inverse))
        lapack.append(residual(exact, torch.cholesky_inverse(torch.linalg.cholesky(f + shift * torch.eye(n)))))
    assert max(ours) <= 2 * max(lapack)


@hypothesis.given(
    sizes=st.lists(st.integers(0, 150), max_size=6),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "offset"]),
    seed=st.integers(0, 1000),
)
def test_ragged_lists_of_any_layout(sizes: list[int], dtype: torch.dtype, shared: bool, layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    factors = []
    for n in sizes:
        f = factor(n, dtype)
        if layout == "transposed":
            f = f.mT
        elif layout == "strided":
            f = torch.full((2 * n, 3 * n), torch.nan, dtype=dtype)[::2, ::3].copy_(f)
        elif layout == "offset":
            f = torch.full((n + 2, n + 1), torch.nan, dtype=dtype)[2:, 1:].copy_(f)
        factors.append(f)
    damping = torch.rand((), dtype=dtype) + 0.1 if shared else torch.rand(len(sizes), dtype=dtype) + 0.1
    inverses, info = damped_inverse(factors, damping)
    assert info.tolist() == [0] * len(sizes)
    for f, value, inverse in zip(factors, damping.expand(len(sizes)), inverses, strict=True):
        assert_inverse(f, float(value), inverse)


@pytest.mark.parametrize("n", [5, 64, 100, 200])
def test_only_the_lower_triangle_is_read(n: int) -> None:
    f = factor(n)
    poisoned = f.clone()
    poisoned[torch.ones(n, n, dtype=torch.bool).triu(1)] = torch.nan
    shift = torch.tensor(0.1)
    assert torch.equal(damped_inverse([poisoned], shift)[0][0], damped_inverse([f], shift)[0][0])
    assert torch.equal(damped_inverse([poisoned.mT.contiguous().mT], shift)[0][0], damped_inverse([f], shift)[0][0])


def test_expanded_factor_and_strided_damping() -> None:
    damping = torch.tensor([1.0, 9.0, 2.0, 9.0])[::2]
    inverses, info = damped_inverse([torch.ones(1, 1).expand(3, 3)] * 2, damping)
    expected, _ = naive.damped_inverse([torch.ones(3, 3).double()] * 2, damping.double())
    assert info.tolist() == [0, 0]
    for inverse, reference in zip(inverses, expected, strict=True):
        torch.testing.assert_close(inverse.double(), reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [6, 64, 100, 150, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_matrices_are_reported_and_leave_the_others_alone(n: int, dtype: torch.dtype) -> None:
    good = [factor(n, dtype) for _ in range(3)]
    indefinite = torch.eye(n, dtype=dtype)
    bad_row = n - n // 3
    indefinite[bad_row - 1, bad_row - 1] = -1
    with_nan, with_inf = factor(n, dtype), factor(n, dtype)
    with_nan[n - 1, 0] = torch.nan
    with_inf[n // 2, n // 2] = torch.inf
    factors = [good[0], indefinite, good[1], with_nan, with_inf, good[2]]
    shift = torch.full((6,), 0.1, dtype=dtype)
    inverses, info = damped_inverse(factors, shift)
    assert info.tolist() == [0, bad_row, 0, -1, -1, 0]
    assert torch.equal(info, naive.damped_inverse(factors, shift)[1])
    for i in (1, 3, 4):
        assert inverses[i].isnan().all()
    alone, _ = damped_inverse(good, shift[:3])
    for i, reference in zip((0, 2, 5), alone, strict=True):
        assert torch.equal(inverses[i], reference)


def test_singular_without_damping_and_rescued_by_it() -> None:
    f = factor(40, rank=10)
    f = torch.block_diag(f, torch.zeros(1, 1))
    _, info = damped_inverse([f], torch.tensor(0.0))
    assert info.item() > 0
    (inverse,), info = damped_inverse([f], torch.tensor(0.1))
    assert info.item() == 0
    assert_inverse(f, 0.1, inverse)


@pytest.mark.parametrize("n", [1, 100, 200])
def test_an_inverse_too_large_for_its_type_is_reported(n: int) -> None:
    (inverse,), info = damped_inverse([torch.eye(n) * 1e-39], torch.tensor(0.0))
    assert info.item() == -1
    assert inverse.isnan().all()


@pytest.mark.parametrize("sizes", [[300], [300, 40, 40], [200, 200, 130, 8], [64] * 9, [1024], [770, 90], [1601]])
def test_results_do_not_depend_on_threads_or_company(sizes: list[int]) -> None:
    factors = [factor(n) for n in sizes]
    shift = torch.tensor(0.05)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(damped_inverse(factors, shift)[0])
    finally:
        torch.set_num_threads(threads)
    results.append([damped_inverse([f], shift)[0][0] for f in factors])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_inputs_are_left_alone_and_empty_lists_pass() -> None:
    f = factor(70)
    before = f.clone()
    damped_inverse([f], torch.tensor(0.1))
    assert torch.equal(f, before)
    inverses, info = damped_inverse([], torch.tensor(0.1))
    assert inverses == []
    assert info.shape == (0,)


@pytest.mark.parametrize(
    ("factors", "damping", "message"),
    [
        ([torch.eye(3)[0]], torch.tensor(0.1), r"factors\[0\]: expected a 2-dimensional tensor .*got shape \(3,\)"),
        (
            [torch.eye(3), torch.ones(2, 3)],
            torch.tensor(0.1),
            r"factors\[1\]: expected a square matrix, got .*\(2, 3\)",
        ),
        ([torch.eye(3).double()], torch.tensor(0.1), r"factors\[0\]: expected .*[Ff]loat"),
        ([torch.eye(3).int()], torch.tensor(0.1), r"factors\[0\]"),
        ([torch.eye(3).bfloat16()], torch.tensor(0.1).bfloat16(), "damping: expected float32 or float64"),
        ([torch.eye(3).cfloat()], torch.tensor(0.1), r"factors\[0\]"),
        ([torch.eye(3)], torch.tensor([0.1, 0.1]), r"damping: expected shape \(1,\).*got \(2,\)"),
        ([torch.eye(3)], torch.full((1, 1), 0.1), r"damping: expected shape"),
    ],
)
def test_wrong_arguments_are_named(factors: list[Tensor], damping: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match="kronfac::damped_inverse: " + message):
        damped_inverse(factors, damping)
    with pytest.raises(RuntimeError, match="kronfac::damped_inverse: " + message):
        damped_inverse([f.to("meta") for f in factors], damping.to("meta"))


@pytest.mark.cpu_only("on a GPU nobody waits for the device: info tells")
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_bad_damping_is_refused(value: float) -> None:
    with pytest.raises(
        RuntimeError, match=r"kronfac::damped_inverse: damping: expected finite values >= 0, got .* index 1"
    ):
        damped_inverse([torch.eye(3)] * 2, torch.tensor([0.1, value]))


def test_inputs_that_require_grad_are_refused() -> None:
    f = torch.eye(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"kronfac::damped_inverse: factors: .*not differentiable"):
        damped_inverse([f], torch.tensor(0.1))
    with pytest.raises(RuntimeError, match=r"kronfac::damped_inverse: damping: .*not differentiable"):
        damped_inverse([f.detach()], torch.tensor(0.1, requires_grad=True))
    with torch.no_grad():
        assert not damped_inverse([f], torch.tensor(0.1))[0][0].requires_grad


@pytest.mark.parametrize("n", [0, 5, 130])
def test_opcheck(n: int) -> None:
    op = torch.ops.kronfac.damped_inverse.default
    torch.library.opcheck(op, ([factor(n), factor(n).mT], torch.tensor(0.1)))
    torch.library.opcheck(op, ([factor(n, torch.float64)], torch.tensor([0.1], dtype=torch.float64)))
    torch.library.opcheck(op, ([], torch.tensor(0.1)))


def test_compiles_without_graph_breaks() -> None:
    def run(fs: list[Tensor], damping: Tensor) -> tuple[list[Tensor], Tensor]:
        inverses, info = damped_inverse([f * 2 for f in fs], damping)
        return [x + 1 for x in inverses], info

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        fs, shift = [factor(n), factor(n + 1)], torch.tensor([0.1, 0.2])
        actual, expected = compiled(fs, shift), run(fs, shift)
        assert torch.equal(actual[1], expected[1])
        for a, b in zip(actual[0], expected[0], strict=True):
            assert torch.equal(a, b)
