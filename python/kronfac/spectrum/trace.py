"""Trace of a symmetric operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kronfac.linalg.probes import DISTRIBUTIONS, draw_probes, make_generator, standard_error
from kronfac.linalg.symmetric import CheckedOperator, SymmetricOperator, check_operator
from kronfac.linalg.trace import Estimate, Sketch, StoppedError, exact_diagonal, hutch_pp, spherical, xtrace
from kronfac.spectrum._guard import guarded
from kronfac.spectrum._interrupt import interruptible
from kronfac.spectrum._options import (
    BASIS_BYTES,
    LEAST_BEFORE_STOPPING,
    Progress,
    check_choice,
    check_count,
    check_positive,
    check_sketch,
)
from kronfac.spectrum._progress import shown
from kronfac.spectrum._tally import Tally
from kronfac.spectrum.results import TraceResult

METHODS = ("hutchinson", "hutch++", "xtrace")

# Probes per call of op @ V: one pass over the data serves all of them.
_COLUMNS = 8
# Test vectors that a sketch takes in at once: what a KeyboardInterrupt loses at most.
_STRIDE = 8


def trace(
    op: SymmetricOperator,
    method: str = "hutchinson",
    *,
    probes: int | None = None,
    target_stderr: float | None = None,
    target_relative: float | None = None,
    max_products: int = 10_000,
    distribution: str = "rademacher",
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> TraceResult:
    """Estimate the trace of a symmetric operator, with a standard error.

    "hutchinson" is the mean of vᵀAv over random v with E[vvᵀ] = I; its variance per probe is 2(‖A‖_F² - Σ a_ii²) for
    Rademacher probes and 2‖A‖_F² for Gaussian ones. "hutch++" (Meyer et al., arXiv:2010.09649) and "xtrace" (Epperly,
    Tropp & Webber, arXiv:2301.07825) first take out what a sketch of the range finds: where the eigenvalues decay they
    need far fewer products; where these are flat, about twice as many.

    Args:
        op: a symmetric operator with `shape` and `@` (`kronfac.operators`, a torch matrix).
        method: "hutchinson", "hutch++" or "xtrace".
        probes: products with single vectors to spend, at least 2 ("hutch++": 6, "xtrace": 4; default 100); not together
            with a target. "xtrace" spends an even number. "hutch++" and "xtrace" compute the trace exactly, by n
            products, where that costs no more.
        target_stderr: spend products until the standard error is at most this (in units of the trace), at least 16.
        target_relative: the same as a share of the estimate's magnitude; 0.02 for 2 %.
        max_products: the most to spend on a target; `converged` of the result says whether they were enough.
        distribution: "rademacher" or "gaussian", of the probes; the sketch of "hutch++" is Gaussian, "xtrace" has
            probes of its own on the sphere.
        seed: of the probes; equal seeds give equal results.
        progress: called as progress(products, probes or None); True for a progress bar.

    Returns:
        The estimate, its standard error, and the single samples. After a KeyboardInterrupt those of the probes done,
        which of "hutch++" may be Hutchinson's by the test vectors of its sketch; a second one raises.

    Raises:
        KeyboardInterrupt: before two probes were done, or while the trace was computed exactly.
        TypeError: `op` is no operator, or an option has the wrong type.
        ValueError: unknown method or distribution, an option out of range, a target for "hutch++", whose shares are
            fixed beforehand, memory for the sketch beyond reason, or a product that is not finite.
    """
    operator = check_operator(op, _CALLER)
    check_choice(method, "method", _CALLER, METHODS)
    distribution = check_choice(distribution, "distribution", _CALLER, DISTRIBUTIONS)
    generator = make_generator(seed, _CALLER)
    target = _Target.check(probes, target_stderr, target_relative)
    if target is None:
        limit = check_count(100 if probes is None else probes, "probes", _CALLER, least=_LEAST[method])
    else:
        limit = check_count(max_products, "max_products", _CALLER, least=LEAST_BEFORE_STOPPING)
    if method == "hutch++" and target is not None:
        raise ValueError(
            f"{_CALLER}: target_stderr, target_relative: expected None with method='hutch++', whose share for the "
            "sketch is fixed beforehand; use method='xtrace'"
        )
    with interruptible() as stop, shown(progress, _CALLER) as report:
        operator = guarded(operator, stop)
        tally = Tally(stop, report, limit if target is None else None)
        if method == "hutchinson":
            found = _hutchinson(operator, limit, target, distribution, generator, tally)
        elif method == "hutch++":
            found = _hutch_pp(operator, limit, distribution, generator, tally)
        else:
            found = _xtrace(operator, limit, target, generator, tally)
        if found is None:
            raise KeyboardInterrupt
    return TraceResult(
        value=found.value,
        stderr=found.stderr,
        products=tally.spent,
        samples=torch.tensor(found.samples, dtype=torch.float64),
        method="hutchinson" if found.plain else method,
        interrupted=stop.requested,
        converged=target is None or target.met(found.value, found.stderr),
    )


_CALLER = "kronfac.spectrum.trace"
_LEAST = {"hutchinson": 2, "hutch++": 6, "xtrace": 4}


@dataclass(frozen=True)
class _Target:
    absolute: float
    relative: float

    @classmethod
    def check(cls, probes: int | None, absolute: float | None, relative: float | None) -> _Target | None:
        if sum(value is not None for value in (probes, absolute, relative)) > 1:
            raise ValueError(
                f"{_CALLER}: probes, target_stderr, target_relative: give one of them; the others follow from it"
            )
        if absolute is not None:
            return cls(check_positive(absolute, "target_stderr", _CALLER), 0.0)
        return None if relative is None else cls(0.0, check_positive(relative, "target_relative", _CALLER))

    def met(self, value: float, stderr: float) -> bool:
        return stderr <= max(self.absolute, self.relative * abs(value))


def _exact(operator: CheckedOperator, tally: Tally) -> Estimate | None:
    try:
        value = float(exact_diagonal(operator, tally).sum())
    except StoppedError:  # a part of a trace is no estimate of it
        return None
    return Estimate(value, 0.0, [value], operator.size)


def _hutchinson(
    operator: CheckedOperator,
    limit: int,
    target: _Target | None,
    distribution: str,
    generator: torch.Generator,
    tally: Tally,
) -> Estimate | None:
    bytes_each = operator.size * torch.finfo(operator.dtype).bits // 8
    columns = max(1, min(_COLUMNS, BASIS_BYTES // bytes_each))
    samples: list[float] = []
    try:
        while len(samples) < limit:
            count = min(columns, limit - len(samples))
            drawn = draw_probes(
                operator.size, count, distribution, generator, dtype=operator.dtype, device=operator.device
            )
            samples += (drawn * operator.matmat(drawn)).sum(dim=0, dtype=torch.float64).tolist()
            tally(count)
            enough = target is not None and len(samples) >= LEAST_BEFORE_STOPPING
            if enough and target is not None and target.met(float(np.mean(samples)), standard_error(samples)):
                break
    except StoppedError:
        if len(samples) < 2:
            return None
    return Estimate(float(np.mean(samples)), standard_error(samples), samples, len(samples))


def _hutch_pp(
    operator: CheckedOperator, limit: int, distribution: str, generator: torch.Generator, tally: Tally
) -> Estimate | None:
    if operator.size <= limit:
        return _exact(operator, tally)
    check_sketch(operator, limit // 3, _CALLER)
    return hutch_pp(operator, limit, generator, distribution, tally)


def _xtrace(
    operator: CheckedOperator,
    limit: int,
    target: _Target | None,
    generator: torch.Generator,
    tally: Tally,
) -> Estimate | None:
    sketch = Sketch(operator)
    size = limit // 2 if target is None else LEAST_BEFORE_STOPPING // 2
    found: Estimate | None = None
    while True:
        more = size - sketch.Q.shape[1]
        if operator.size <= 2 * more or size > operator.size - 2:
            return _exact(operator, tally) or found
        check_sketch(operator, size, _CALLER)
        try:
            for first in range(0, more, _STRIDE):
                sketch.extend(spherical(operator, min(_STRIDE, more - first), generator), tick=tally)
        except StoppedError:
            return xtrace(sketch) if sketch.Q.shape[1] >= 2 else None
        found = xtrace(sketch)
        if target is None or target.met(found.value, found.stderr) or found.products + 2 > limit:
            return found
        # By half at a time: at the end at most half of the products were too many.
        size = min(size + max(2, size // 2), limit // 2)
