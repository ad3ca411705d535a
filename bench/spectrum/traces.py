"""Products for the same error of a trace: XTrace and Hutch++ against Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import kronfac
from bench.spectrum.problem import Problem
from kronfac.linalg.symmetric import SymmetricOperator

Say = Callable[[str], None]
METHODS = ("xtrace", "hutch++")


def decaying(size: int) -> tuple[torch.Tensor, float]:
    """A symmetric matrix with eigenvalues 1/k² in a random basis, float64, and its trace."""
    values = 1.0 / torch.arange(1, size + 1, dtype=torch.float64) ** 2
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, _ = torch.linalg.qr(draw)
    return (basis * values) @ basis.mT, float(values.sum())


def compare(problem: Problem, products: int, seeds: int, probes: int, say: Say) -> dict[str, Any]:
    """Measure errors over seeds and what Hutchinson's estimator would need for them.

    Args:
        problem: its Gauss-Newton matrix is one of the two operators.
        products: that each run of XTrace and Hutch++ spends.
        seeds: runs of each.
        probes: from which the variance of one of Hutchinson's probes is measured.
        say: prints.
    """
    matrix, trace = decaying(1000)
    network = kronfac.operators.ggn(problem.model, F.cross_entropy, (problem.inputs, problem.targets))
    cases: dict[str, tuple[SymmetricOperator, float]] = {
        "eigenvalues 1/k^2, n = 1000": (matrix, trace),
        f"Gauss-Newton matrix, n = {problem.size}": (network, problem.gauss_newton_trace()),
    }
    return {name: _case(name, *case, products, seeds, probes, say) for name, case in cases.items()}


def _case(
    name: str, operator: SymmetricOperator, exact: float, products: int, seeds: int, probes: int, say: Say
) -> dict[str, Any]:
    samples = kronfac.spectrum.trace(operator, "hutchinson", probes=probes, seed=1000).samples.numpy()
    variance = float(np.mean((samples - exact) ** 2))
    result: dict[str, Any] = {"exact": exact, "hutchinson_variance": variance, "hutchinson_probes": probes}
    for method in METHODS:
        errors = [
            kronfac.spectrum.trace(operator, method, probes=products, seed=seed).value - exact for seed in range(seeds)
        ]
        squared = float(np.mean(np.square(errors)))
        needed = variance / squared
        result[method] = {
            "products": products,
            "relative_rms_error": squared**0.5 / abs(exact),
            "hutchinson_products": needed,
            "ratio": needed / products,
        }
        say(
            f"trace, {name}: {method:8} {products} products, rms error {squared**0.5 / abs(exact):.2%} over {seeds} "
            f"seeds; Hutchinson needs {needed:.0f} products for it: {needed / products:.1f}x"
        )
    return result
