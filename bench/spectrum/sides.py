"""How each side is asked for eigenvalues, and which settings of a peer are worth trying."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kronfac
from bench.spectrum.problem import Problem

Setting = dict[str, Any]
SEED = 0


class GivenUpError(Exception):
    """A run went on for longer than a run that is certified already; the message says after how many products."""


@dataclass
class Meter:
    """Counts products and ends a run that cannot win any more.

    Attributes:
        deadline: reading of `clock` after which the next product raises; None for never.
        clock: seconds.
        products: so far.
    """

    deadline: float | None = None
    clock: Callable[[], float] = time.perf_counter
    products: int = field(default=0)

    def count(self) -> None:
        """One more product.

        Raises:
            GivenUpError: the deadline is over.
        """
        self.products += 1
        if self.deadline is not None and self.clock() > self.deadline:
            raise GivenUpError(f"given up after {self.products} products")


@dataclass(frozen=True)
class Pairs:
    """What a side returned: values (k,), vectors as columns (n, k)."""

    values: Tensor
    vectors: Tensor


Solve = Callable[[Problem, int, Setting, Meter], Pairs]


def kronfac_pairs(problem: Problem, k: int, setting: Setting, meter: Meter) -> Pairs:
    """`kronfac.spectrum.eigsh`, with the graph made in the time that counts."""
    operator = kronfac.operators.hessian(problem.model, F.cross_entropy, (problem.inputs, problem.targets))
    result = kronfac.spectrum.eigsh(operator, k, seed=SEED, **setting)
    meter.products = result.products
    return Pairs(result.values, result.vectors)


def pyhessian_pairs(problem: Problem, k: int, setting: Setting, meter: Meter) -> Pairs:
    """PyHessian's power iteration with deflation; its stream is torch's global one."""
    options = dict(setting)
    with _pyhessian(problem.in_precision(options.pop("precision")), meter) as analysis:
        values, vectors = analysis.eigenvalues(top_n=k, **options)
    columns = [torch.cat([part.detach().reshape(-1) for part in vector]) for vector in vectors]
    return Pairs(torch.tensor(values, dtype=torch.float64), torch.stack(columns, dim=1))


def pyhessian_density(problem: Problem, probes: int, steps: int) -> tuple[list[Any], list[Any]]:
    """PyHessian's stochastic Lanczos quadrature: nodes and weights per probe."""
    with _pyhessian(problem, Meter()) as analysis:
        nodes, weights = analysis.density(iter=steps, n_v=probes)
    return nodes, weights


def eigenthings_lanczos(problem: Problem, k: int, setting: Setting, meter: Meter) -> Pairs:
    """hessian-eigenthings' Lanczos."""
    module = importlib.import_module("hessian_eigenthings")
    options = dict(setting)
    operator = _eigenthings_operator(problem.in_precision(options.pop("precision")), options.pop("method"), meter)
    result = module.lanczos(operator, k=k, seed=SEED, **options)
    return Pairs(result.eigenvalues, result.eigenvectors.T)


def eigenthings_power(problem: Problem, k: int, setting: Setting, meter: Meter) -> Pairs:
    """hessian-eigenthings' power iteration with deflation."""
    module = importlib.import_module("hessian_eigenthings")
    options = dict(setting)
    operator = _eigenthings_operator(problem.in_precision(options.pop("precision")), options.pop("method"), meter)
    result = module.deflated_power_iteration(operator, k=k, seed=SEED, **options)
    return Pairs(result.eigenvalues, result.eigenvectors.T)


def _eigenthings_operator(problem: Problem, method: str, meter: Meter) -> Any:
    module = importlib.import_module("hessian_eigenthings")

    class Counting(module.HessianOperator):  # type: ignore[misc, name-defined]
        def matvec(self, v: Tensor) -> Tensor:
            meter.count()
            product: Tensor = super().matvec(v)
            return product

    batch = (problem.inputs, problem.targets)
    return Counting(problem.fresh_model(), [batch], module.supervised_loss(F.cross_entropy), method=method)


@contextmanager
def _pyhessian(problem: Problem, meter: Meter) -> Iterator[Any]:
    """PyHessian on a copy of the model, its products counted, torch.eig replaced, torch's stream as it was."""
    module = importlib.import_module("pyhessian.hessian")
    product, eig, dtype = module.hessian_vector_product, torch.eig, torch.get_default_dtype()

    def counted(*arguments: Any) -> Any:
        meter.count()
        return product(*arguments)

    def symmetric_eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    module.hessian_vector_product, torch.eig = counted, symmetric_eig  # type: ignore[assignment]
    torch.set_default_dtype(problem.inputs.dtype)  # of the vectors that it draws
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            data = (problem.inputs, problem.targets)
            yield module.hessian(problem.fresh_model(), F.cross_entropy, data=data, cuda=False)
    finally:
        torch.set_default_dtype(dtype)
        module.hessian_vector_product, torch.eig = product, eig


@dataclass(frozen=True)
class Method:
    """A peer's way to eigenvalues.

    Attributes:
        solve: runs it.
        families: series of settings, each from cheap to expensive: within one, what comes after a certified setting
            need not be tried.
    """

    solve: Solve
    families: Callable[[int], list[list[Setting]]]


@dataclass(frozen=True)
class Peer:
    """A library that is compared with.

    Attributes:
        name: as printed.
        module: what to import.
        methods: by name.
    """

    name: str
    module: str
    methods: dict[str, Method]

    def present(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


_TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
_ITERATIONS = 100_000  # more than any run gets to


def _lanczos_steps(k: int) -> list[int]:
    """From 2k, their default, in steps of about a tenth."""
    steps = [2 * k]
    while steps[-1] < 20 * k:
        steps.append(max(steps[-1] + 1, round(steps[-1] * 1.1)))
    return steps


def _pyhessian_power(k: int) -> list[list[Setting]]:
    return [
        [{"precision": precision, "tol": tolerance, "maxIter": _ITERATIONS} for tolerance in _TOLERANCES]
        for precision in ("float32", "float64")
    ]


def _eigenthings_lanczos(k: int) -> list[list[Setting]]:
    variants: list[Setting] = [
        {"precision": "float32", "method": "autograd", "reorthogonalize": True},
        {"precision": "float64", "method": "autograd", "reorthogonalize": True},
        {"precision": "float32", "method": "finite_difference", "reorthogonalize": True},
        {"precision": "float32", "method": "autograd", "reorthogonalize": False},
    ]
    return [[variant | {"max_iter": steps} for steps in _lanczos_steps(k)] for variant in variants]


def _eigenthings_power(k: int) -> list[list[Setting]]:
    return [
        [
            {"precision": "float32", "method": "autograd", "tol": tolerance, "max_iter": _ITERATIONS, "momentum": 0.0}
            for tolerance in _TOLERANCES
        ]
    ]


PEERS = (
    Peer("PyHessian", "pyhessian", {"power": Method(pyhessian_pairs, _pyhessian_power)}),
    Peer(
        "hessian-eigenthings",
        "hessian_eigenthings",
        {
            "lanczos": Method(eigenthings_lanczos, _eigenthings_lanczos),
            "power": Method(eigenthings_power, _eigenthings_power),
        },
    ),
)
