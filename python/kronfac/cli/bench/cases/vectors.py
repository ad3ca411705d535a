"""Cases of `orthogonalize_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kronfac import ops
from kronfac.cli.bench.case import OURS, Case, Contest

PASSES = 2
# (n, m): the parameters of a network, the vectors that Lanczos has stored
SHAPES = ((10_000_000, 50), (1_000_000, 50), (1_000_000, 10), (96_000, 50), (16_000, 20))
BLOCK = 64  # period of the basis: a power of two >= m that divides n
CHUNK = 1 << 20


def cases() -> Iterator[Case]:
    """All cases of this module."""
    for n, m in SHAPES:
        yield Case(
            op="orthogonalize_",
            name=f"n={n} m={m}",
            prepare=partial(_orthogonalize, n, m),
            # The floor: the basis once per product with all of it, except that a subtraction and the next projection
            # can share one reading. The traffic of w itself is in the noise.
            work=4.0 * m * n * (PASSES + 1),
            unit="byte",
            quick=n == SHAPES[-1][0],
        )


def walsh_rows(n: int, m: int) -> Tensor:
    """Orthonormal rows (m, n) without any factorisation: Walsh functions of period 64 with random signs.

    Orthogonality is exact but for the rounding of the common factor, which is why the cost of preparing 10^7 × 50 is
    that of writing it.
    """
    assert n % BLOCK == 0 and m <= BLOCK  # noqa: PT018
    hadamard = torch.ones(1, 1)
    while len(hadamard) < BLOCK:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = torch.randint(0, 2, (n,)).mul_(2).sub_(1).to(torch.float32)
    rows = hadamard[:m].repeat(1, n // BLOCK)
    return rows.mul_(signs).mul_(n**-0.5)


def _orthogonalize(n: int, m: int) -> Contest:
    basis = walsh_rows(n, m)
    start = torch.randn(n)
    buffers: dict[str, Tensor] = {}

    def ours() -> Tensor:
        w = buffers.setdefault(OURS, start.clone())
        ops.orthogonalize_(w, basis, PASSES)
        return w

    def rival() -> Tensor:
        w = buffers.setdefault("torch", start.clone())
        for _ in range(PASSES):
            w.addmv_(basis.T, basis @ w, alpha=-1)
        return w

    sides: dict[str, Callable[[], Any]] = {OURS: ours, "torch": rival}
    if not basis.is_cpu:
        return Contest(sides, partial(_error, basis, start))
    array = basis.numpy()

    def numpy_rival() -> Tensor:
        w = buffers.setdefault("numpy", start.clone())
        view = w.numpy()
        for _ in range(PASSES):
            view -= (array @ view) @ array
        return w

    sides["numpy"] = numpy_rival
    return Contest(sides, partial(_error, basis, start))


def _error(basis: Tensor, start: Tensor, w: Tensor) -> float:
    """Distance from the projection in float64, over the length of what was projected; in chunks, for memory's sake."""
    parts = [slice(j, j + CHUNK) for j in range(0, len(start), CHUNK)]
    coefficients = torch.zeros(len(basis), dtype=torch.float64)
    for part in parts:
        coefficients += basis[:, part].double() @ start[part].double()
    squares = torch.zeros((), dtype=torch.float64)
    for part in parts:
        exact = start[part].double() - coefficients @ basis[:, part].double()
        squares += (w[part].double() - exact).square().sum()
    return float(squares.sqrt() / torch.linalg.norm(start.double()))
