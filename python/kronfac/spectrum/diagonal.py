"""Diagonal of a symmetric operator."""

from __future__ import annotations

import torch

from kronfac.linalg.probes import draw_probes, make_generator
from kronfac.linalg.symmetric import CheckedOperator, SymmetricOperator, check_operator
from kronfac.linalg.trace import Sketch, StoppedError, exact_diagonal, xdiag
from kronfac.spectrum._guard import guarded
from kronfac.spectrum._interrupt import interruptible
from kronfac.spectrum._options import Progress, check_choice, check_count, check_sketch
from kronfac.spectrum._progress import shown
from kronfac.spectrum._tally import Tally
from kronfac.spectrum.results import DiagonalResult

METHODS = ("hutchinson", "xdiag")

_CALLER = "kronfac.spectrum.diagonal"
_COLUMNS = 8  # probes per call of op @ V: one pass over the data serves all of them. A KeyboardInterrupt may lose them
_LEAST = {"hutchinson": 2, "xdiag": 4}


def diagonal(
    op: SymmetricOperator,
    method: str = "hutchinson",
    *,
    probes: int = 100,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> DiagonalResult:
    """Estimate the diagonal of a symmetric operator, with standard errors.

    "hutchinson" is the mean of v ∘ Av over Rademacher probes v (Bekas, Kokiopoulou & Saad 2007); the variance of entry
    i per probe is Σ_{j≠i} a_ij². "xdiag" (Epperly, Tropp & Webber, arXiv:2301.07825) takes out first what a sketch of
    the range finds, and needs far fewer products where the eigenvalues decay.

    Args:
        op: a symmetric operator with `shape` and `@` (`kronfac.operators`, a torch matrix).
        method: "hutchinson" or "xdiag".
        probes: products with single vectors to spend, at least 2 ("xdiag": 4, and an even number is spent). Where n
            products are no more, the diagonal is computed exactly.
        seed: of the probes; equal seeds give equal results.
        progress: called as progress(products, probes); True for a progress bar.

    Returns:
        The diagonal with a standard error for each entry. After a KeyboardInterrupt that of the probes done; a second
        one raises.

    Raises:
        KeyboardInterrupt: before two probes were done, or while the diagonal was computed exactly.
        TypeError: `op` is no operator, or an option has the wrong type.
        ValueError: unknown method, an option out of range, memory for the sketch beyond reason, or a product that is
            not finite.
    """
    operator = check_operator(op, _CALLER)
    check_choice(method, "method", _CALLER, METHODS)
    probes = check_count(probes, "probes", _CALLER, least=_LEAST[method])
    generator = make_generator(seed, _CALLER)
    if operator.size > probes and method == "xdiag":
        check_sketch(operator, probes // 2, _CALLER)
    with interruptible() as stop, shown(progress, _CALLER) as report:
        operator = guarded(operator, stop)
        tally = Tally(stop, report, min(probes, operator.size))
        if operator.size <= probes:
            found = _exact(operator, tally)
        elif method == "hutchinson":
            found = _hutchinson(operator, probes, generator, tally)
        else:
            found = _xdiag(operator, probes, generator, tally)
        if found is None:
            raise KeyboardInterrupt
    return DiagonalResult(*found, tally.spent, method, stop.requested)


_Estimate = tuple[torch.Tensor, torch.Tensor]
"""The diagonal and its standard errors."""


def _exact(operator: CheckedOperator, tally: Tally) -> _Estimate | None:
    try:
        values = exact_diagonal(operator, tally)
    except StoppedError:
        return None
    return values, torch.zeros_like(values)


def _xdiag(operator: CheckedOperator, probes: int, generator: torch.Generator, tally: Tally) -> _Estimate | None:
    sketch = Sketch(operator)
    try:
        for first in range(0, probes // 2, _COLUMNS):
            count = min(_COLUMNS, probes // 2 - first)
            drawn = draw_probes(
                operator.size, count, "rademacher", generator, dtype=operator.dtype, device=operator.device
            )
            sketch.extend(drawn, tick=tally)
    except StoppedError:
        if sketch.Q.shape[1] < 2:
            return None
    return xdiag(sketch)


def _hutchinson(operator: CheckedOperator, probes: int, generator: torch.Generator, tally: Tally) -> _Estimate | None:
    mean = torch.zeros(operator.size, dtype=torch.float64)
    squares, done = torch.zeros_like(mean), 0
    try:
        while done < probes:
            count = min(_COLUMNS, probes - done)
            drawn = draw_probes(
                operator.size, count, "rademacher", generator, dtype=operator.dtype, device=operator.device
            )
            for sample in (drawn * operator.matmat(drawn)).to("cpu", torch.float64).unbind(1):
                # Welford's recurrence: the sums of squares of a large mean would cancel.
                done += 1
                step = sample - mean
                mean += step / done
                squares += step * (sample - mean)
            tally(count)
    except StoppedError:
        if done < 2:
            return None
    return mean, (squares / (done - 1) / done).sqrt()
