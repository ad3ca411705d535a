"""The block-tridiagonal inverse on plain tensors, against the property that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronfac.linalg.damped import factored_damping
from kronfac.optim.structures.base import Averages
from kronfac.optim.structures.tridiagonal import LINKED, Pair, TridiagonalInverse, apply_chains, link

SIZES = [(3, 2), (4, 3), (2, 4), (3, 2)]  # (out, in) of each layer
DAMPING = [0.1, 0.02, 0.3, 0.05]


def correlated(sizes: list[int], rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows of each layer that depend on those of the layer before."""
    result = [torch.randn(rows, sizes[0], dtype=dtype)]
    for size in sizes[1:]:
        weight = torch.randn(result[-1].shape[1], size, dtype=dtype)
        result.append(torch.tanh(result[-1] @ weight) + 0.3 * torch.randn(rows, size, dtype=dtype))
    return result


def statistics(rows: int = 40, dtype: torch.dtype = torch.float64) -> list[Averages]:
    a = correlated([inputs for _, inputs in SIZES], rows, dtype)
    g = correlated([outputs for outputs, _ in SIZES], rows, dtype)
    result = []
    for i in range(len(SIZES)):
        extra = {}
        if i + 1 < len(SIZES):
            extra = {"next_A": a[i].mT @ a[i + 1] / rows, "next_G": g[i].mT @ g[i + 1] / rows}
        result.append(Averages(a[i].mT @ a[i] / rows, g[i].mT @ g[i] / rows, extra))
    return result


def factorise(factors: list[Averages], damping: list[float]) -> list[dict[str, Tensor]]:
    done = TridiagonalInverse().factorise(factors, damping)
    values = [value for value in done.values if value is not None]
    assert len(values) == len(factors)
    pairs = [Pair(factors[i], values[i + 1], damping[i]) for i in range(len(factors) - 1)]
    for value, more in zip(values, link(pairs), strict=False):
        value.update(more or {})
    return values


def damped(factors: list[Averages], damping: list[float]) -> list[tuple[Tensor, Tensor]]:
    shares = factored_damping(
        [f.A for f in factors], [f.G for f in factors], torch.tensor(damping, dtype=factors[0].A.dtype)
    )
    return [
        (f.A + a * torch.eye(len(f.A), dtype=a.dtype), f.G + g * torch.eye(len(f.G), dtype=g.dtype))
        for f, a, g in zip(factors, *shares, strict=True)
    ]


def dense(values: list[dict[str, Tensor]], following: list[int | None]) -> Tensor:
    """The matrix that `apply_chains` multiplies by, column by column."""
    sizes = [out * inputs for out, inputs in SIZES]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        grads = [part.view(shape) for part, shape in zip(unit.split(sizes), SIZES, strict=True)]  # type: ignore
        out, dots = apply_chains(grads, values, following)
        torch.testing.assert_close(dots.sum(), sum((p * v).sum() for p, v in zip(out, grads, strict=True)))
        columns.append(torch.cat([p.reshape(-1) for p in out]))
    return torch.stack(columns, 1)


def block(matrix: Tensor, i: int, j: int) -> Tensor:
    ends = [0]
    for out, inputs in SIZES:
        ends.append(ends[-1] + out * inputs)
    return matrix[ends[i] : ends[i + 1], ends[j] : ends[j + 1]]


def test_it_is_the_inverse_of_the_one_completion_with_a_tridiagonal_inverse() -> None:
    """Exactly one matrix has the given tridiagonal blocks and an inverse without others (Dempster, 1972)."""
    factors = statistics()
    inverse = dense(factorise(factors, DAMPING), [1, 2, 3, None])
    torch.testing.assert_close(inverse, inverse.mT)
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    completed = torch.linalg.inv(inverse)
    for i, (A, G) in enumerate(damped(factors, DAMPING)):
        torch.testing.assert_close(block(completed, i, i), torch.kron(G, A), rtol=1e-8, atol=1e-10)
        if i + 1 < len(factors):
            extra = factors[i].extra
            wanted = torch.kron(extra["next_G"], extra["next_A"])
            torch.testing.assert_close(block(completed, i, i + 1), wanted, rtol=1e-8, atol=1e-10)
        for j in range(i + 2, len(factors)):
            assert block(inverse, i, j).abs().max() < 1e-10


def test_it_is_the_product_of_the_paper() -> None:
    """Ξᵀ Λ Ξ written out, section 4.3."""
    factors = statistics()
    blocks = [torch.kron(G, A) for A, G in damped(factors, DAMPING)]
    sizes = [len(b) for b in blocks]
    Xi = torch.eye(sum(sizes), dtype=torch.float64)
    Lambda = torch.zeros_like(Xi)
    for i, own in enumerate(blocks):
        if i + 1 < len(blocks):
            cross = torch.kron(factors[i].extra["next_G"], factors[i].extra["next_A"])
            psi = cross @ torch.linalg.inv(blocks[i + 1])
            block(Xi, i, i + 1).copy_(-psi)
            own = own - psi @ blocks[i + 1] @ psi.mT
        block(Lambda, i, i).copy_(torch.linalg.inv(own))
    torch.testing.assert_close(
        dense(factorise(factors, DAMPING), [1, 2, 3, None]), Xi.mT @ Lambda @ Xi, rtol=1e-8, atol=1e-9
    )


def test_without_a_successor_a_layer_is_a_block_of_its_own() -> None:
    factors = statistics()
    values = factorise(factors, DAMPING)
    inverse = dense(values, [1, None, 3, None])  # the second layer's successor has no gradient
    blocks = [torch.linalg.inv(torch.kron(G, A)) for A, G in damped(factors, DAMPING)]
    torch.testing.assert_close(block(inverse, 1, 1), _alone(values, 1, blocks[1], inverse), rtol=1e-8, atol=1e-9)
    assert not block(inverse, 1, 2).any()
    torch.testing.assert_close(torch.linalg.inv(inverse)[:6, :6], torch.linalg.inv(blocks[0]), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(dense(values, [None] * 4), torch.block_diag(*blocks), rtol=1e-8, atol=1e-9)


def _alone(values: list[dict[str, Tensor]], i: int, own: Tensor, inverse: Tensor) -> Tensor:
    """The block of the last layer of a chain of two: its own inverse and what its predecessor adds, Ψᵀ Σ⁻¹ Ψ."""
    f = values[i - 1]
    psi = torch.kron(f["psi_G"], f["psi_A"])
    return own + psi.mT @ block(inverse, i - 1, i - 1) @ psi


@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_float32_follows_float64(damping: float) -> None:
    """Also where Σ is nearly singular: the bias, 1 in both layers' inputs, is predicted perfectly."""
    torch.manual_seed(0)
    wide = statistics(rows=200)
    for f in wide:
        f.A[-1] = f.A[:, -1] = 0.0
        f.A[-1, -1] = 1.0
        if f.extra:
            f.extra["next_A"][-1] = 0.0
            f.extra["next_A"][:, -1] = 0.0
            f.extra["next_A"][-1, -1] = 1.0
    narrow = [Averages(f.A.float(), f.G.float(), {k: v.float() for k, v in f.extra.items()}) for f in wide]
    grads = [torch.randn(shape, dtype=torch.float64) for shape in SIZES]
    exact, _ = apply_chains(grads, factorise(wide, [damping] * 4), [1, 2, 3, None])
    values = factorise(narrow, [damping] * 4)
    assert all(set(LINKED) <= set(value) for value in values[:-1])
    ours, _ = apply_chains([g.float() for g in grads], values, [1, 2, 3, None])
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-3 * float(other.abs().max()))


@pytest.mark.parametrize("what", ["inconsistent", "not finite", "not positive"])
def test_a_pair_without_a_positive_definite_remainder_is_left_out(what: str) -> None:
    factors = statistics()
    values = TridiagonalInverse().factorise(factors, DAMPING).values
    broken = factors[1]
    if what == "inconsistent":  # more correlated than two variables can be
        broken.extra["next_A"].mul_(10)
    elif what == "not finite":
        broken.extra["next_G"][0, 0] = float("inf")
    else:
        broken.A.sub_(5 * torch.eye(len(broken.A), dtype=torch.float64))
    pairs = [Pair(factors[i], values[i + 1] or {}, DAMPING[i]) for i in range(3)]
    done = link(pairs)
    assert done[1] is None
    assert done[0] is not None
    assert done[2] is not None
    assert all(tensor.isfinite().all() for value in (done[0], done[2]) for tensor in value.values())
    assert link([]) == []
