"""Trace and Frobenius norm of every diagonal block from one series of products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from kronfac.linalg.probes import draw_probes, make_generator, standard_error
from kronfac.linalg.trace import StoppedError
from kronfac.operators import ParameterOperator
from kronfac.spectrum._guard import Guarded
from kronfac.spectrum._interrupt import interruptible
from kronfac.spectrum._options import LEAST_BEFORE_STOPPING, Progress, check_count, check_positive
from kronfac.spectrum._progress import shown
from kronfac.spectrum.results import BlockTraceResult

_CALLER = "kronfac.spectrum.block_traces"
_COLUMNS = 8  # probes per call of op @ V: one pass over the data serves all of them
_CHECK_EVERY = 1.05  # times as many probes: what may be spent beyond a target


def block_traces(
    op: ParameterOperator,
    groups: Mapping[str, Iterable[str]] | None = None,
    *,
    probes: int | None = None,
    target_relative: float | None = None,
    max_products: int = 10_000,
    restricted: bool = False,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> dict[str, BlockTraceResult]:
    """Estimate the trace of each layer's block of a curvature matrix, and how large its entries are.

    One product Hv with a Rademacher vector over all parameters serves all blocks: v_lᵀ(Hv)_l estimates tr H_ll, and
    ‖(Hv)_l‖² the squared Frobenius norm of the layer's rows, Σ_k ‖H_lk‖_F². The other layers add to the variance of
    the trace, 2(Σ_k ‖H_lk‖_F² - Σ_i h_ii²). With `restricted` each block has probes and products of its own: the
    variance is that of the block alone and ‖H_ll‖_F² is what is estimated, for as many sweeps as there are blocks.

    Args:
        op: an operator of `kronfac.operators`.
        groups: names of parameters or modules by group name; None for one group per module.
        probes: vectors, at least 2; with `restricted` for each block (default 100); not together with a target.
        target_relative: spend vectors, at least 16, until the standard error of every trace is at most this share of
            the largest one's magnitude; 0.02 for 2 %. Not of its own, since the trace of a block may be close to 0; for
            that there is `trace(op.blocks()[name], target_relative=...)`. Not with `restricted`.
        max_products: the most to spend on a target; `converged` of each result says whether they were enough.
        restricted: probe each block alone.
        seed: of the probes; equal seeds give equal results.
        progress: called as progress(products, products in all or None); True for a progress bar.

    Returns:
        By module or group name. After a KeyboardInterrupt of the probes done, without blocks that have not been probed
        twice; a second one raises.

    Raises:
        KeyboardInterrupt: before two probes were done.
        TypeError: `op` is no operator of `kronfac.operators`, or an option has the wrong type.
        ValueError: an option out of range, an unknown name in `groups`, or a product that is not finite.
    """
    if not isinstance(op, ParameterOperator):
        raise TypeError(f"{_CALLER}: op: expected an operator of kronfac.operators, got {type(op).__name__}")
    if target_relative is None:
        limit = check_count(100 if probes is None else probes, "probes", _CALLER, least=2)
    elif probes is not None:
        raise ValueError(f"{_CALLER}: probes, target_relative: give one of them; the other follows from it")
    elif restricted:
        raise ValueError(
            f"{_CALLER}: target_relative: expected None with restricted=True, whose blocks have nothing in common; use "
            "kronfac.spectrum.trace(op.blocks()[name], target_relative=...)"
        )
    else:
        target_relative = check_positive(target_relative, "target_relative", _CALLER)
        limit = check_count(max_products, "max_products", _CALLER, least=LEAST_BEFORE_STOPPING)
    generator = make_generator(seed, _CALLER)
    blocks = op.blocks(groups)
    if restricted:
        places = {name: torch.arange(block.shape[0]) for name, block in blocks.items()}
        sweeps = [(block, {name: places[name]}) for name, block in blocks.items()]
    else:
        sweeps = [(op, {name: op.entries_of(block) for name, block in blocks.items()})]
    traces: dict[str, list[float]] = {name: [] for name in blocks}
    squares: dict[str, list[float]] = {name: [] for name in blocks}
    done, total = 0, limit * len(sweeps) if target_relative is None else None
    with interruptible() as stop, shown(progress, _CALLER) as report:
        for operator, entries in sweeps:
            check_at = float(LEAST_BEFORE_STOPPING)
            for first in range(0, limit, _COLUMNS):
                if stop.stops(done - 1):  # one probe has no standard error
                    break
                count = min(_COLUMNS, limit - first)
                drawn = draw_probes(
                    operator.shape[0], count, "rademacher", generator, dtype=operator.dtype, device=operator.device
                )
                try:
                    product = Guarded(operator, stop) @ drawn
                except StoppedError:
                    stop.stops(done - 1)
                    break
                for name, index in entries.items():
                    own = product[index.to(product.device)]
                    mine = drawn[index.to(product.device)]
                    traces[name] += (mine * own).sum(0, dtype=torch.float64).tolist()
                    squares[name] += own.square().sum(0, dtype=torch.float64).tolist()
                done += count
                if report is not None:
                    report(done, total)
                # Not after every probe: the errors of many blocks take their time as well.
                if target_relative is not None and first + count >= check_at:
                    check_at = (first + count) * _CHECK_EVERY
                    if len(_precise(traces, target_relative)) == len(traces):
                        break
    traces = {name: found for name, found in traces.items() if len(found) >= 2}
    met = set(traces) if target_relative is None else _precise(traces, target_relative)
    return {
        name: BlockTraceResult(
            size=blocks[name].shape[0],
            trace=sum(found) / len(found),
            trace_stderr=standard_error(found),
            squared_frobenius=sum(squares[name]) / len(found),
            squared_frobenius_stderr=standard_error(squares[name]),
            restricted=restricted,
            products=len(found),
            interrupted=stop.requested,
            converged=name in met,
        )
        for name, found in traces.items()
    }


def _precise(traces: Mapping[str, list[float]], share: float) -> set[str]:
    """The blocks whose standard error is at most this share of the largest trace."""
    largest = max((abs(sum(found) / len(found)) for found in traces.values()), default=0.0)
    return {name for name, found in traces.items() if standard_error(found) <= share * largest}
