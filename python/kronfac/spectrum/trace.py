"""Trace of a symmetric operator by random probes."""

from __future__ import annotations

import numpy as np
import torch

from kronfac.linalg.probes import DISTRIBUTIONS, draw_probes, make_generator, standard_error
from kronfac.linalg.symmetric import SymmetricOperator, check_operator
from kronfac.spectrum._options import BASIS_BYTES, Progress, check_choice, check_count, check_positive
from kronfac.spectrum.results import TraceResult

METHODS = ("hutchinson",)

# Probes per call of op @ V: one pass over the data serves all of them.
_COLUMNS = 8
# A standard error from fewer probes is too unsure to stop by.
_LEAST_BEFORE_STOPPING = 16


def trace(
    op: SymmetricOperator,
    method: str = "hutchinson",
    *,
    probes: int | None = None,
    target_stderr: float | None = None,
    max_products: int = 10_000,
    distribution: str = "rademacher",
    seed: int = 0,
    progress: Progress | None = None,
) -> TraceResult:
    """Estimate the trace of a symmetric operator, with a standard error.

    Hutchinson's estimator: the mean of vᵀAv over random v with E[vvᵀ] = I. Its variance per probe is
    2(‖A‖_F² - Σ a_ii²) for Rademacher probes and 2‖A‖_F² for Gaussian ones.

    Args:
        op: a symmetric operator with `shape` and `@` (`kronfac.operators`, a torch matrix).
        method: "hutchinson".
        probes: number of probes, at least 2 (default 100); not together with `target_stderr`.
        target_stderr: add probes until the standard error is at most this (in units of the trace), at least 16.
        max_products: the most probes to spend on `target_stderr`; compare `stderr` of the result with the target.
        distribution: "rademacher" or "gaussian".
        seed: of the probes; equal seeds give equal results.
        progress: called as progress(products, probes or None).

    Returns:
        The estimate, its standard error, and the single samples.

    Raises:
        TypeError: `op` is no operator, or an option has the wrong type.
        ValueError: unknown method or distribution, an option out of range, or a product that is not finite.
    """
    caller = "kronfac.spectrum.trace"
    operator = check_operator(op, caller)
    check_choice(method, "method", caller, METHODS)
    distribution = check_choice(distribution, "distribution", caller, DISTRIBUTIONS)
    if probes is not None and target_stderr is not None:
        raise ValueError(f"{caller}: probes, target_stderr: give one of them; the other follows from it")
    if target_stderr is not None:
        target_stderr = check_positive(target_stderr, "target_stderr", caller)
        limit = check_count(max_products, "max_products", caller, least=_LEAST_BEFORE_STOPPING)
    else:
        limit = check_count(100 if probes is None else probes, "probes", caller, least=2)
    generator = make_generator(seed, caller)
    bytes_each = operator.size * torch.finfo(operator.dtype).bits // 8
    columns = max(1, min(_COLUMNS, BASIS_BYTES // bytes_each))
    samples: list[float] = []
    while len(samples) < limit:
        count = min(columns, limit - len(samples))
        drawn = draw_probes(operator.size, count, distribution, generator, dtype=operator.dtype, device=operator.device)
        samples += (drawn * operator.matmat(drawn)).sum(dim=0, dtype=torch.float64).tolist()
        if progress is not None:
            progress(len(samples), limit if target_stderr is None else None)
        enough = target_stderr is not None and len(samples) >= _LEAST_BEFORE_STOPPING
        if enough and standard_error(samples) <= (target_stderr or 0.0):
            break
    return TraceResult(
        value=float(np.mean(samples)),
        stderr=standard_error(samples),
        products=len(samples),
        samples=torch.tensor(samples, dtype=torch.float64),
    )
