"""kronfac::orthogonalize_ against the float64 definition."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from kronfac.ops import naive, orthogonalize_

DTYPES = [torch.float32, torch.float64]
LAYOUTS = ["rows", "columns", "strided", "padded"]


def orthonormal_rows(m: int, n: int, dtype: torch.dtype, layout: str = "rows") -> Tensor:
    v = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64)).Q.mT.to(dtype)
    if layout == "columns":  # a row of the basis is a column in memory
        return v.mT.contiguous().mT
    if layout == "strided":
        return torch.full((2 * m, 3 * n), torch.nan, dtype=dtype)[::2, ::3].copy_(v)
    if layout == "padded":
        return torch.full((m, n + 5), torch.nan, dtype=dtype)[:, 3 : n + 3].copy_(v)
    return v.contiguous()


def assert_like_the_definition(w: Tensor, basis: Tensor, passes: int) -> None:
    expected = w.double().clone()
    coefficients = naive.orthogonalize_(expected, basis.double(), passes)
    scale = float(w.double().norm()) + 1e-30
    actual = orthogonalize_(w, basis, passes)
    tolerance = 4 * torch.finfo(w.dtype).eps * scale * max(1, len(basis)) ** 0.5
    assert actual.shape == (len(basis),)
    assert actual.dtype == w.dtype
    assert float((w.double() - expected).abs().max() if len(w) else 0) <= tolerance
    assert float((actual.double() - coefficients).abs().max() if len(basis) else 0) <= tolerance


@hypothesis.given(
    m=st.integers(0, 40),
    extra=st.sampled_from([0, 1, 3, 60, 300, 1000]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    passes=st.integers(1, 3),
    step=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_layout(
    m: int, extra: int, dtype: torch.dtype, layout: str, passes: int, step: int, seed: int
) -> None:
    torch.manual_seed(seed)
    n = m + extra
    whole = torch.randn(step * n, dtype=dtype)
    before = whole.clone()
    w = whole[::step]
    assert_like_the_definition(w, orthonormal_rows(m, n, dtype, layout), passes)
    untouched = torch.ones(step * n, dtype=torch.bool)
    untouched[::step] = False
    assert torch.equal(whole[untouched], before[untouched])


# More columns than one block holds, one that fills the last block by a single column, and a basis of more rows than
# columns fit.
@pytest.mark.parametrize(("m", "n"), [(3, 70_000), (20, 8193), (130, 20_001), (600, 700)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks(m: int, n: int, dtype: torch.dtype) -> None:
    assert_like_the_definition(torch.randn(n, dtype=dtype), orthonormal_rows(m, n, dtype), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_passes_reach_working_precision(layout: str) -> None:
    basis = orthonormal_rows(30, 5000, torch.float32, layout)
    # Nearly in the span: what is left is 1e-4 of w, so that one pass leaves components of about 1e-7 / 1e-4.
    w = basis.mT @ torch.randn(30) + 1e-4 * torch.randn(5000) / 5000**0.5
    once = w.clone()
    orthogonalize_(once, basis, passes=1)
    orthogonalize_(w, basis, passes=2)
    left = (basis.double() @ w.double()).abs().max() / w.double().norm()
    left_once = (basis.double() @ once.double()).abs().max() / once.double().norm()
    assert left < 1e-6
    assert left_once > 5 * left


def test_coefficients_rebuild_the_vector() -> None:
    basis, original = orthonormal_rows(12, 3000, torch.float64), torch.randn(3000, dtype=torch.float64)
    w = original.clone()
    coefficients = orthogonalize_(w, basis)
    torch.testing.assert_close(w + basis.mT @ coefficients, original, rtol=0, atol=1e-13)


@pytest.mark.cpu_only("threads of the CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_threads(layout: str) -> None:
    basis, original = orthonormal_rows(17, 40_000, torch.float32, layout), torch.randn(40_000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            w = original.clone()
            results.append((orthogonalize_(w, basis), w))
    finally:
        torch.set_num_threads(threads)
    for coefficients, w in results[1:]:
        assert torch.equal(coefficients, results[0][0])
        assert torch.equal(w, results[0][1])


def test_a_row_of_the_same_storage_is_allowed_when_it_is_another() -> None:
    for stored in (torch.randn(5, 200), torch.randn(200, 5).mT):
        stored[:4].copy_(orthonormal_rows(4, 200, torch.float32))
        assert_like_the_definition(stored[4], stored[:4], 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_shared_memory_is_refused(transposed: bool) -> None:
    stored = torch.randn(200, 5).mT if transposed else torch.randn(5, 200)
    before = stored.clone()
    for w in (stored[2], stored[4]):
        with pytest.raises(RuntimeError, match=r"kronfac::orthogonalize_: w: .*shares memory"):
            orthogonalize_(w, stored)
    assert torch.equal(stored, before)


@pytest.mark.parametrize(
    ("w", "basis", "passes", "message"),
    [
        (torch.ones(3, 1), torch.eye(3), 2, r"w: expected a 1-dimensional tensor \(n,\), got shape \(3, 1\)"),
        (torch.ones(3), torch.ones(3), 2, r"basis: expected a 2-dimensional tensor \(m, n\), got shape \(3,\)"),
        (torch.ones(3), torch.eye(4), 2, r"basis: expected shape \(m, 3\).*got \(4, 4\)"),
        (torch.ones(3), torch.eye(3).double(), 2, "basis: expected .*[Ff]loat"),
        (torch.ones(3).half(), torch.eye(3).half(), 2, "w: expected float32 or float64"),
        (torch.ones(3).long(), torch.eye(3).long(), 2, "w: expected float32 or float64"),
        (torch.ones(3).cfloat(), torch.eye(3).cfloat(), 2, "w: expected float32 or float64"),
        (torch.ones(3), torch.eye(3), 0, "passes: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(w: Tensor, basis: Tensor, passes: int, message: str) -> None:
    before = w.clone()
    with pytest.raises(RuntimeError, match="kronfac::orthogonalize_: " + message):
        orthogonalize_(w, basis, passes)
    assert torch.equal(w, before)
    with pytest.raises(RuntimeError, match="kronfac::orthogonalize_: " + message):
        orthogonalize_(w.to("meta"), basis.to("meta"), passes)


def test_expanded_vectors_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"kronfac::orthogonalize_: w: .*expanded"):
        orthogonalize_(torch.ones(1).expand(3), torch.eye(3))


def test_inputs_that_require_grad_are_refused() -> None:
    w, basis = torch.ones(3), torch.eye(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"kronfac::orthogonalize_: basis: .*not differentiable"):
        orthogonalize_(w, basis)
    assert torch.equal(w, torch.ones(3))
    with torch.no_grad():
        orthogonalize_(w, basis)


@pytest.mark.parametrize(("m", "n"), [(0, 4), (3, 0), (3, 40)])
def test_opcheck(m: int, n: int) -> None:
    op = torch.ops.kronfac.orthogonalize_.default
    torch.library.opcheck(op, (torch.randn(n), torch.randn(m, n)))
    torch.library.opcheck(op, (torch.randn(2 * n)[::2], torch.randn(n, m).mT, 1))


def test_compiles_without_graph_breaks() -> None:
    def run(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        w = w * 2
        return orthogonalize_(w, basis) + 1, w

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 33):
        w, basis = torch.randn(n), orthonormal_rows(4, n, torch.float32)
        for a, b in zip(compiled(w, basis), run(w, basis), strict=True):
            assert torch.equal(a, b)
