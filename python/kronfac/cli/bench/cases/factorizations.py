"""Cases of `damped_inverse` and `damped_eigh`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy
import numpy.typing
import torch
from torch import Tensor

from kronfac import ops
from kronfac.cli.bench.case import OURS, Case, Contest, relative_error, spd_factor, worst
from kronfac.cli.bench.networks import factor_sizes

DAMPING = 1e-3
SCIPY_UP_TO = 2500  # order from which one more rival only costs time
MOVES, MOVE_DECAY = 10, 0.95

# Eigen decompositions of symmetric matrices with all vectors take about 9 n^3 operations (Golub & Van Loan, 8.3).
EIGH_WORK = 9.0


def cases() -> Iterator[Case]:
    """All cases of this module."""
    inverse_lists = {f"n={n}": [n] for n in (256, 512, 1024)}
    inverse_lists |= {name: factor_sizes(name) for name in ("resnet20", "resnet50", "autoencoder")}
    inverse_lists |= {"64 of n=16": [16] * 64, "64 of n=64": [64] * 64}
    for name, sizes in inverse_lists.items():
        yield Case(
            op="damped_inverse",
            name=name,
            prepare=partial(_inverse, sizes),
            work=float(sum(n**3 for n in sizes)),
            quick=name in ("n=256", "64 of n=16"),
        )
    eigen_lists = {f"64 of n={n}": [n] * 64 for n in (8, 16, 32, 64, 128)}
    eigen_lists |= {f"n={n}": [n] for n in (256, 512, 1024)} | {"resnet20": factor_sizes("resnet20")}
    for name, sizes in eigen_lists.items():
        yield Case(
            op="damped_eigh",
            name=name,
            prepare=partial(_eigh, sizes),
            work=EIGH_WORK * sum(n**3 for n in sizes),
            quick=name == "64 of n=16",
        )
    warm_lists = {f"n={n}": [n] for n in (256, 512, 1024)}
    warm_lists |= {"64 of n=64": [64] * 64, "resnet20": factor_sizes("resnet20"), "8 of n=32": [32] * 8}
    for name, sizes in warm_lists.items():
        yield Case(
            op="damped_eigh",
            name=f"warm start, {name}",
            prepare=partial(_warm_eigh, sizes),
            work=EIGH_WORK * sum(n**3 for n in sizes),
            quick=name == "8 of n=32",
        )


def _inverse(sizes: list[int]) -> Contest:
    factors = [spd_factor(n) for n in sizes]
    damping = torch.tensor(DAMPING)
    identities = {n: torch.eye(n) for n in sizes}

    def rival() -> list[Tensor]:
        return [
            torch.cholesky_inverse(torch.linalg.cholesky(factor + DAMPING * identities[n]))
            for factor, n in zip(factors, sizes, strict=True)
        ]

    sides: dict[str, Callable[[], Any]] = {OURS: lambda: ops.damped_inverse(factors, damping)[0], "torch": rival}
    if max(sizes) <= SCIPY_UP_TO and factors[0].is_cpu:
        _add_scipy(sides, "potri", partial(_scipy_inverses, [factor.numpy() for factor in factors]))
    # Float64 costs more than what is measured: the largest, the smallest, and some between stand for all.
    by_size = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    judged = sorted({by_size[round(step * (len(sizes) - 1) / 4)] for step in range(5)})
    truths = {
        i: torch.cholesky_inverse(torch.linalg.cholesky(factors[i].double() + DAMPING * identities[sizes[i]].double()))
        for i in judged
    }
    return Contest(sides, lambda inverses: worst([relative_error(inverses[i], truths[i]) for i in judged]))


def _eigh(sizes: list[int]) -> Contest:
    factors = [spd_factor(n) for n in sizes]
    zero = torch.tensor(0.0)
    sides: dict[str, Callable[[], Any]] = {OURS: lambda: ops.damped_eigh(factors, zero)[:2]}
    if len(set(sizes)) == 1:
        stacked = torch.stack(factors)
        sides["torch"] = lambda: torch.linalg.eigh(stacked)
        if stacked.is_cpu:
            array = stacked.numpy()
            sides["numpy"] = lambda: tuple(map(torch.from_numpy, numpy.linalg.eigh(array)))
    else:
        sides["torch"] = lambda: tuple(zip(*map(torch.linalg.eigh, factors), strict=True))
    if len(sizes) == 1 and factors[0].is_cpu:
        _add_scipy(sides, "eigh", partial(_scipy_eigh, factors[0].numpy()))
    return Contest(sides, partial(_eigen_error, factors))


def _warm_eigh(sizes: list[int]) -> Contest:
    """Factors that ten steps of the running average moved, with the bases of before."""
    before, after = [], []
    for n in sizes:
        scales = torch.arange(1, n + 1, dtype=torch.float32).rsqrt()
        mixing, _ = torch.linalg.qr(torch.randn(n, n))

        def sample(n: int = n, scales: Tensor = scales, mixing: Tensor = mixing) -> Tensor:
            x = (torch.randn(2 * n, n) * scales) @ mixing
            return x.T @ x / len(x)

        factor = sample()
        for _ in range(20):
            factor = MOVE_DECAY * factor + (1 - MOVE_DECAY) * sample()
        before.append(factor)
        for _ in range(MOVES):
            factor = MOVE_DECAY * factor + (1 - MOVE_DECAY) * sample()
        after.append(factor)
    zero = torch.tensor(0.0)
    basis = ops.damped_eigh(before, zero)[1]
    return Contest(
        {
            OURS: lambda: ops.damped_eigh(after, zero, basis)[:2],
            "kronfac cold": lambda: ops.damped_eigh(after, zero)[:2],
            "torch": lambda: tuple(zip(*map(torch.linalg.eigh, after), strict=True)),
        },
        partial(_eigen_error, after),
    )


def _eigen_error(factors: list[Tensor], result: tuple[Any, Any]) -> float:
    """The worse of two distances: Q diag(w) Q^T from F, and Q^T Q from I. Both small make the damped solve accurate."""
    errors = []
    for factor, values, vectors in zip(factors, *result, strict=True):
        exact, w, q = factor.double(), values.double(), vectors.double()
        errors.append(relative_error((q * w) @ q.mT, exact))
        errors.append(relative_error(q.mT @ q, torch.eye(len(q), dtype=torch.float64)))
    return worst(errors)


def _add_scipy(sides: dict[str, Callable[[], Any]], routine: str, call: Callable[[Any], Any]) -> None:
    try:
        from scipy import linalg
    except ModuleNotFoundError:
        return
    module = linalg.lapack if routine == "potri" else linalg
    sides["scipy"] = partial(call, module)


def _scipy_inverses(factors: list[numpy.typing.NDArray[numpy.float32]], lapack: Any) -> list[Tensor]:
    inverses = []
    for factor in factors:
        damped = factor + DAMPING * numpy.eye(len(factor), dtype=factor.dtype)
        # On the transpose, which is Fortran's order of the same matrix: no copy. The result is one triangle.
        triangle, _ = lapack.spotrf(damped.T, lower=1, overwrite_a=1)
        inverse, _ = lapack.spotri(triangle, lower=1, overwrite_c=1)
        inverses.append(torch.from_numpy(numpy.tril(inverse) + numpy.tril(inverse, -1).T))
    return inverses


def _scipy_eigh(factor: numpy.typing.NDArray[numpy.float32], linalg: Any) -> tuple[list[Tensor], list[Tensor]]:
    values, vectors = linalg.eigh(factor, driver="evd")
    return [torch.from_numpy(values)], [torch.from_numpy(vectors)]
