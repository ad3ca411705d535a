"""kronfac::damped_eigh against float64 and against the definition of an eigendecomposition."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from kronfac.ops import damped_eigh, naive

DTYPES = [torch.float32, torch.float64]


def factor(n: int, dtype: torch.dtype = torch.float32, rank: int | None = None) -> Tensor:
    """Positive semi-definite, eigenvalues of order 1."""
    x = torch.randn(n if rank is None else rank, n, dtype=torch.float64)
    return (x.mT @ x / max(1, len(x))).to(dtype)


def symmetrised(f: Tensor) -> Tensor:
    lower = f.double().tril()
    return lower + lower.tril(-1).mT


def assert_decomposition(f: Tensor, damping: float, values: Tensor, vectors: Tensor) -> None:
    """Residual and orthogonality as LAPACK promises them: a modest multiple of n eps |F|, in the worst case."""
    n = len(f)
    assert values.shape == (n,)
    assert vectors.shape == (n, n)
    assert values.dtype == vectors.dtype == f.dtype
    if n == 0:
        return
    assert vectors.stride() == (1, n)
    exact, q, eps = symmetrised(f), vectors.double(), torch.finfo(f.dtype).eps
    norm = float(torch.linalg.matrix_norm(exact, 2)) + damping
    shifted = exact + damping * torch.eye(n, dtype=torch.float64)
    assert bool((values.diff() >= 0).all())
    assert bool((values >= torch.tensor(damping, dtype=f.dtype)).all())
    expected = torch.linalg.eigvalsh(exact).clamp(min=0) + damping
    tolerance = 4 * eps * n**0.5 * norm + 2 * eps * norm
    assert float((values.double() - expected).abs().max()) <= tolerance
    assert float((shifted @ q - q * values.double()).abs().max()) <= tolerance
    assert float((q.mT @ q - torch.eye(n, dtype=torch.float64)).abs().max()) <= 4 * eps * n**0.5 + 4 * eps


@hypothesis.given(
    sizes=st.lists(st.integers(0, 90), max_size=6),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
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
        factors.append(f)
    damping = torch.rand((), dtype=dtype) if shared else torch.rand(len(sizes), dtype=dtype)
    values, vectors, info = damped_eigh(factors, damping)
    assert info.tolist() == [0] * len(sizes)
    assert info.dtype == torch.int32
    for f, value, a, q in zip(factors, damping.expand(len(sizes)), values, vectors, strict=True):
        assert_decomposition(f, float(value), a, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 200, 385])
def test_sizes(n: int, dtype: torch.dtype) -> None:
    f = factor(n, dtype)
    (values,), (vectors,), info = damped_eigh([f], torch.tensor(0.1, dtype=dtype))
    assert info.tolist() == [0]
    assert_decomposition(f, float(torch.tensor(0.1, dtype=dtype)), values, vectors)


def test_special_spectra() -> None:
    identity, zero, rank_one = torch.eye(20), torch.zeros(20, 20), torch.ones(20, 20)
    diagonal = torch.diag(torch.arange(20.0, 0.0, -1.0))
    graded = torch.diag(torch.logspace(0, -12, 20))
    tiny, huge = factor(20) * 1e-30, factor(20) * 1e30
    factors = [identity, zero, rank_one, diagonal, graded, tiny, huge]
    values, vectors, info = damped_eigh(factors, torch.tensor(0.0))
    assert info.tolist() == [0] * len(factors)
    for f, a, q in zip(factors, values, vectors, strict=True):
        assert_decomposition(f, 0.0, a, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 32, 64, 100, 128])
def test_many_of_one_order(n: int, dtype: torch.dtype) -> None:
    # Small orders are solved side by side in the lanes of a vector, each lane with its own course of iterations.
    wide = dtype == torch.float64
    kinds = [
        factor(n, dtype),
        factor(n, dtype, rank=(n + 1) // 2),
        torch.eye(n, dtype=dtype),
        torch.zeros(n, n, dtype=dtype),
        torch.ones(n, n, dtype=dtype),
        torch.diag(torch.arange(n, 0, -1, dtype=dtype)),
        torch.diag(torch.logspace(0, -12, n, dtype=dtype)),
        torch.block_diag(factor(n // 2, dtype), torch.eye(n - n // 2, dtype=dtype)),  # splits in the middle
        (2 * torch.eye(n) - torch.eye(n).roll(1, 0).tril() - torch.eye(n).roll(1, 0).tril().mT).to(dtype),
        factor(n, dtype) * (1e-300 if wide else 1e-30),
        factor(n, dtype) * (1e300 if wide else 1e30),
        factor(n, dtype) * torch.finfo(dtype).smallest_normal,
    ]
    factors = [
        kinds[i % len(kinds)] for i in range(29)
    ]  # two vectors of any width, not filled, each kind in many lanes
    values, vectors, info = damped_eigh(factors, torch.tensor(0.0, dtype=dtype))
    assert info.tolist() == [0] * len(factors)
    for i, f in enumerate(factors):
        scale = float(f.abs().max()) or 1.0  # squares in the judge itself must not overflow
        assert_decomposition((f.double() / scale).to(dtype), 0.0, (values[i].double() / scale).to(dtype), vectors[i])


@pytest.mark.parametrize("n", [3, 16, 40])
def test_a_matrix_does_not_see_its_neighbours(n: int) -> None:
    mine, others = factor(n), [factor(n) * 10.0**k for k in range(-12, 12)]
    nan = torch.full((n, n), torch.nan)
    for place in range(0, 32, 5):
        company = [*others, nan, torch.eye(n)] + [torch.zeros(n, n)] * 6
        company[place] = mine
        values, vectors, info = damped_eigh(company, torch.tensor(0.1))
        crowd_values, crowd_vectors, _ = damped_eigh([mine] * 32, torch.tensor(0.1))
        assert info[place] == 0
        assert torch.equal(values[place], crowd_values[0])
        assert torch.equal(vectors[place], crowd_vectors[0])


def test_eigenvalues_are_floored_at_the_damping() -> None:
    f = factor(30, rank=5)
    (bare,), _, _ = damped_eigh([f], torch.tensor(0.0))
    assert bool((bare >= 0).all())
    assert bool((torch.linalg.eigvalsh(f) < 0).any())  # what the floor is for
    (damped,), _, _ = damped_eigh([f], torch.tensor(0.25))
    assert bool((damped >= 0.25).all())
    indefinite = torch.diag(torch.tensor([-3.0, 1.0]))
    assert damped_eigh([indefinite], torch.tensor(0.5))[0][0].tolist() == [0.5, 1.5]


def test_only_the_lower_triangle_is_read() -> None:
    for n in (5, 40, 130, 300):
        f = factor(n)
        poisoned = f.clone()
        poisoned[torch.ones(n, n, dtype=torch.bool).triu(1)] = torch.nan
        for x in (poisoned, poisoned.mT.contiguous().mT):
            (values,), (vectors,), info = damped_eigh([x], torch.tensor(0.1))
            assert info.tolist() == [0]
            assert_decomposition(f, float(torch.tensor(0.1)), values, vectors)


@pytest.mark.parametrize("n", [6, 40, 90])
@pytest.mark.parametrize("with_basis", [False, True])
def test_bad_matrices_are_reported_and_leave_the_others_alone(n: int, with_basis: bool) -> None:
    good = [factor(n) for _ in range(3)]
    with_nan, with_inf = factor(n), factor(n)
    with_nan[n - 1, 0] = torch.nan
    with_inf[n // 2, n // 2] = torch.inf
    factors = [good[0], with_nan, good[1], with_inf, good[2]]
    basis = [torch.eye(n)] * 5 if with_basis else None
    values, vectors, info = damped_eigh(factors, torch.tensor(0.1), basis)
    assert info.tolist() == [0, -1, 0, -1, 0]
    assert torch.equal(info, naive.damped_eigh(factors, torch.tensor(0.1), basis)[2])
    for i in (1, 3):
        assert values[i].isnan().all()
        assert vectors[i].isnan().all()
        assert vectors[i].stride() == (1, n)
    for i, f in zip((0, 2, 4), good, strict=True):
        assert_decomposition(f, float(torch.tensor(0.1)), values[i], vectors[i])


def nearby(f: Tensor, amount: float) -> Tensor:
    return (1 - amount) * f + amount * factor(len(f), f.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 31, 64, 150])
@pytest.mark.parametrize("amount", [0.0, 1e-6, 1e-3, 0.1])
def test_warm_start_from_a_nearby_matrix(n: int, dtype: torch.dtype, amount: float) -> None:
    # Half the rank: a cluster of equal (zero) eigenvalues, in which the old vectors are not eigenvectors of the new
    # matrix.
    for f in (factor(n, dtype), factor(n, dtype, rank=(n + 1) // 2)):
        _, basis, _ = damped_eigh([f], torch.tensor(0.0, dtype=dtype))
        moved = nearby(f, amount)
        (values,), (vectors,), info = damped_eigh([moved], torch.tensor(0.05, dtype=dtype), basis)
        assert info.tolist() == [0]
        assert_decomposition(moved, float(torch.tensor(0.05, dtype=dtype)), values, vectors)


@pytest.mark.cpu_only("the basis is left aside on a GPU: whether refining it held is known on the device alone")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amount", [0.0, 1e-13])
def test_a_basis_that_holds_is_kept(dtype: torch.dtype, amount: float) -> None:
    # A full solution chooses the signs of its vectors anew; a refined basis keeps those it was given.
    n = 160
    f = factor(n, dtype) + torch.diag(torch.arange(n, dtype=dtype))
    f = (f + f.mT) / 2
    (_,), (vectors,), _ = damped_eigh([f], torch.tensor(0.0, dtype=dtype))
    flipped = vectors * (torch.arange(n) % 2 * 2 - 1).to(dtype)
    moved = f + amount * factor(n, dtype)
    (values,), (kept,), info = damped_eigh([moved], torch.tensor(0.05, dtype=dtype), [flipped])
    assert info.tolist() == [0]
    assert_decomposition(moved, float(torch.tensor(0.05, dtype=dtype)), values, kept)
    assert bool(((kept * flipped).sum(0) > 0.99).all())


@pytest.mark.parametrize("n", [3, 16, 40, 150])
def test_a_bad_basis_cannot_spoil_the_result(n: int) -> None:
    f = factor(n)
    nan, inf = torch.full((n, n), torch.nan), torch.full((n, n), torch.inf)
    skewed = torch.eye(n) + 0.01 * torch.randn(n, n)
    bases = [
        nan,
        inf,
        torch.zeros(n, n),
        torch.ones(n, n),
        2 * torch.eye(n),
        skewed,
        torch.randn(n, n),
        torch.eye(n).flip(0),
    ]
    bases.append(torch.randn(2 * n, 3 * n)[::2, ::3])
    values, vectors, info = damped_eigh([f] * len(bases), torch.tensor(0.05), bases)
    assert info.tolist() == [0] * len(bases)
    for a, q in zip(values, vectors, strict=True):
        assert_decomposition(f, float(torch.tensor(0.05)), a, q)


@pytest.mark.parametrize("sizes", [[200], [150, 20, 20], [80, 80, 60, 8], [24] * 9])
def test_deterministic_and_inputs_left_alone(sizes: list[int]) -> None:
    factors, shift = [factor(n) for n in sizes], torch.tensor(0.05)
    copies = [f.clone() for f in factors]
    first = damped_eigh(factors, shift)
    for basis in (None, None, first[1], first[1]):
        again = damped_eigh(factors, shift, basis)
        reference = first if basis is None else damped_eigh(factors, shift, basis)
        for a, b in zip([*again[0], *again[1]], [*reference[0], *reference[1]], strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(factors, copies, strict=True))


E3 = torch.eye(3)


@pytest.mark.parametrize(
    ("factors", "damping", "basis", "message"),
    [
        ([E3[0]], torch.tensor(0.1), None, r"factors\[0\]: expected a 2-dimensional tensor .*got shape \(3,\)"),
        ([E3, torch.ones(2, 3)], torch.tensor(0.1), None, r"factors\[1\]: expected a square matrix, got .*\(2, 3\)"),
        ([E3.double()], torch.tensor(0.1), None, r"factors\[0\]: expected .*the type of damping"),
        ([E3.int()], torch.tensor(0.1), None, r"factors\[0\]: expected"),
        ([E3.half()], torch.tensor(0.1).half(), None, "damping: expected float32 or float64"),
        ([E3], torch.tensor([0.1, 0.1]), None, r"damping: expected shape \(1,\).*got \(2,\)"),
        ([E3], torch.tensor(0.1), [], "basis: expected 1 tensors, one for each of factors, got 0"),
        (
            [E3],
            torch.tensor(0.1),
            [torch.eye(2)],
            r"basis\[0\]: expected the shape of factors\[0\] \(3, 3\), got \(2, 2\)",
        ),
        ([E3], torch.tensor(0.1), [E3.double()], r"basis\[0\]: expected .*the type of damping"),
        ([E3], torch.tensor(0.1), [torch.ones(3, 2)], r"basis\[0\]: expected a square matrix"),
    ],
)
def test_wrong_arguments_are_named(
    factors: list[Tensor], damping: Tensor, basis: list[Tensor] | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match="kronfac::damped_eigh: " + message):
        damped_eigh(factors, damping, basis)
    meta = None if basis is None else [b.to("meta") for b in basis]
    with pytest.raises(RuntimeError, match="kronfac::damped_eigh: " + message):
        damped_eigh([f.to("meta") for f in factors], damping.to("meta"), meta)


@pytest.mark.cpu_only("on a GPU nobody waits for the device: info tells")
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_bad_damping_is_refused(value: float) -> None:
    with pytest.raises(
        RuntimeError, match=r"kronfac::damped_eigh: damping: expected finite values >= 0, got .* index 1"
    ):
        damped_eigh([E3] * 2, torch.tensor([0.1, value]))


def test_inputs_that_require_grad_are_refused() -> None:
    f = torch.eye(3, requires_grad=True)
    for args in (
        ([f], torch.tensor(0.1)),
        ([E3], torch.tensor(0.1, requires_grad=True)),
        ([E3], torch.tensor(0.1), [f]),
    ):
        with pytest.raises(RuntimeError, match=r"kronfac::damped_eigh: .*not differentiable"):
            damped_eigh(*args)  # type: ignore[arg-type]
    with torch.no_grad():
        values, vectors, _ = damped_eigh([f, f], torch.tensor(0.1), [f, f])
    assert not any(x.requires_grad for x in (*values, *vectors))


@pytest.mark.parametrize("n", [0, 1, 5, 40])
def test_opcheck(n: int) -> None:
    op = torch.ops.kronfac.damped_eigh.default
    torch.library.opcheck(op, ([factor(n), factor(n).mT], torch.tensor(0.1)))
    torch.library.opcheck(op, ([factor(n, torch.float64)], torch.tensor([0.1], dtype=torch.float64)))
    torch.library.opcheck(op, ([factor(n)], torch.tensor(0.1), [torch.eye(n)]))
    torch.library.opcheck(op, ([], torch.tensor(0.1)))


def test_compiles_without_graph_breaks() -> None:
    def run(fs: list[Tensor], damping: Tensor, basis: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        values, vectors, info = damped_eigh([f * 2 for f in fs], damping, basis)
        return [x + 1 for x in values], vectors, info

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        fs, shift, basis = [factor(n), factor(n + 1)], torch.tensor([0.1, 0.2]), [torch.eye(n), torch.eye(n + 1)]
        actual, expected = compiled(fs, shift, basis), run(fs, shift, basis)
        assert torch.equal(actual[2], expected[2])
        for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            assert torch.equal(a, b)
