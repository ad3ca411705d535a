"""Eigenvalues and gradient norm in the course of a training run, from the checkpoints that it saved."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.linalg.lanczos import norm
from kronfac.operators import ParameterOperator
from kronfac.operators.data import BatchSize
from kronfac.operators.ggn import ggn
from kronfac.operators.hessian import hessian
from kronfac.operators.mean_loss import MeanLoss, model_digest
from kronfac.operators.program import LossFunction, refuse_wrapper
from kronfac.spectrum._checkpoints import Source, first_line, list_sources, load_into, read_source
from kronfac.spectrum._interrupt import Interrupt, interruptible
from kronfac.spectrum._options import Progress, check_choice, check_count, check_positive
from kronfac.spectrum._progress import shown
from kronfac.spectrum._resume import ResumeFile, decode, encode
from kronfac.spectrum._wanted import ORDERS
from kronfac.spectrum.eigsh import eigsh
from kronfac.spectrum.trace import trace
from kronfac.spectrum.training_result import TrainingSpectrumResult

_CALLER = "kronfac.spectrum.through_training"
_OPERATORS = {"hessian": hessian, "ggn": ggn}


def through_training(
    model: nn.Module,
    checkpoints: Sequence[Any] | Mapping[float, Any],
    loss_fn: LossFunction,
    data: Any,
    *,
    k: int = 1,
    which: str = "magnitude",
    operator: str = "hessian",
    params: Iterable[str | Tensor] | None = None,
    tol: float = 1e-3,
    max_products: int | None = None,
    multiplicity: bool = False,
    trace_probes: int = 0,
    reduction: str = "mean",
    batch_size: BatchSize | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> TrainingSpectrumResult:
    """Compute eigenvalues, gradient norm and loss at each of the checkpoints of a training run.

    The parameters of each checkpoint are put into a copy of the model; the model itself is not touched, and of its own
    values matters only that the loss is finite there. A model in float64 computes in float64, whatever
    type the checkpoints have. In a process group every rank analyses its own data.

    Args:
        model: the model, which can be copied with `copy.deepcopy`.
        checkpoints: files or state dicts, in the order of training; or a dict of them by step. A file holds a state
            dict, alone or under "model", "state_dict" or "model_state_dict" (checkpoints of `kronfac train` do), and
            is read with `weights_only=True`: nothing in it is executed. Steps come from the dict, else from the
            file's "global_step", "step" or "epoch", else they are positions.
        loss_fn: called as loss_fn(output, targets), returns a scalar.
        data: as in `kronfac.operators.hessian`.
        k: number of eigenvalues at each checkpoint.
        which: "magnitude", "largest", "smallest" or "both", as in `eigsh`.
        operator: "hessian" or "ggn".
        params: as in `kronfac.operators.hessian`; tensors must be those of `model`.
        tol: tolerance of the residuals relative to the largest eigenvalue.
        max_products: the most products per checkpoint for the eigenvalues, as in `eigsh`.
        multiplicity: search for further copies of repeated eigenvalues.
        trace_probes: Hutchinson probes for the trace at each checkpoint; 0 for no trace.
        reduction: as in `kronfac.operators.hessian`.
        batch_size: as in `kronfac.operators.hessian`.
        seed: of the start vectors and probes.
        checkpoint: a file that keeps what is done of this analysis, for one that is interrupted or extended:
            parameters that it has are not analysed again. It is taken up only where data and options are the same,
            and the loss at the first parameters that it has.
        progress: called as progress(checkpoints done, checkpoints in all); True for a progress bar.

    Returns:
        A table with a row per checkpoint. An interrupt (Ctrl-C) ends the work with the checkpoints done.

    Raises:
        TypeError: an argument of the wrong type, or a model that cannot be copied.
        ValueError: a checkpoint that is damaged or does not fit the model, an option out of range, data or a loss as
            refused by `kronfac.operators.hessian`, or a `checkpoint` of something else.
        OSError: a file is missing or cannot be read or written.
        KeyboardInterrupt: before the first checkpoint was done, or the second one.
    """
    k = check_count(k, "k", _CALLER, least=1)
    which = check_choice(which, "which", _CALLER, ORDERS)
    operator = check_choice(operator, "operator", _CALLER, tuple(_OPERATORS))
    tol = check_positive(tol, "tol", _CALLER)
    trace_probes = check_count(trace_probes, "trace_probes", _CALLER, least=0)
    if trace_probes == 1:
        raise ValueError(f"{_CALLER}: trace_probes: expected 0 or at least 2, got 1: one has no standard error")
    if max_products is not None:
        max_products = check_count(max_products, "max_products", _CALLER, least=2 * k)
    sources = list_sources(checkpoints, _CALLER)
    original = refuse_wrapper(model, _CALLER)
    names = list(MeanLoss(original, loss_fn, data, params, **_options(reduction, batch_size)).layout.names)
    twin = _copy(original)
    loss = MeanLoss(twin, loss_fn, data, names, **_options(reduction, batch_size))
    curvature = _OPERATORS[operator](
        twin, loss_fn, data, names, reduction=reduction, batch_size=batch_size, distributed=False
    )
    settings = {
        "the operator": operator,
        "the chosen parameters": names,
        "the types": sorted({str(tensor.dtype) for tensor in twin.parameters()}),
        "k": k,
        "which": which,
        "tol": tol,
        "max_products": max_products,
        "multiplicity": multiplicity,
        "trace_probes": trace_probes,
        "reduction": reduction,
        "seed": seed,
        "the data": None if checkpoint is None else loss.data_digest(),
    }
    record = ResumeFile(checkpoint, "kronfac through_training", settings, _CALLER)
    table = _Table(k, trace_probes > 0)
    verified = False
    with interruptible() as stop, shown(progress, _CALLER, "checkpoint") as report:
        try:
            for position, source in enumerate(sources):
                if stop.stops(position):
                    break
                saved = read_source(source, _CALLER)
                load_into(twin, saved, source, _CALLER)
                key = model_digest(twin)
                if key in record.done and not verified:
                    _verify(record, key, loss.value(), source)
                    verified = True
                if key not in record.done:
                    row = _row(loss, curvature, k, which, tol, max_products, multiplicity, trace_probes, seed, stop)
                    if stop.stops(position):  # the row may be of fewer products than asked for
                        break
                    record.put(key, row)
                table.add(source, saved.step, saved.unit, record.done[key])
                if report is not None:
                    report(position + 1, len(sources))
        finally:
            record.write()
    return table.result(interrupted=len(table.rows) < len(sources))


def _options(reduction: str, batch_size: BatchSize | None) -> dict[str, Any]:
    return {"reduction": reduction, "batch_size": batch_size, "caller": _CALLER}


def _copy(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # whatever the parts of a model raise
        raise TypeError(
            f"{_CALLER}: model: cannot be copied ({first_line(error)}), and the "
            "checkpoints are put into a copy; pass a fresh model of the same class"
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _verify(record: ResumeFile, key: str, value: float, source: Source) -> None:
    """Compare a loss with the file's: it tells another loss function, or another arithmetic."""
    saved = decode(record.done[key]["loss"])
    if saved != value and not (math.isnan(saved) and math.isnan(value)):
        raise record.refuse(
            f"the loss of {source.name} was {saved!r} and is {value!r} now (another loss_fn, batch_size, number of "
            "threads, or version of torch?)"
        )


def _row(
    loss: MeanLoss,
    curvature: ParameterOperator,
    k: int,
    which: str,
    tol: float,
    max_products: int | None,
    multiplicity: bool,
    trace_probes: int,
    seed: int,
    stop: Interrupt,
) -> dict[str, Any]:
    """All that is computed at one checkpoint, as plain values for JSON; less where an interrupt was requested."""
    value, length = loss.value(), math.nan
    row: dict[str, Any] = {"loss": encode(value), "products": 0}
    if math.isfinite(value):
        length = norm(loss.gradient()[1])
    row["gradient_norm"] = encode(length)
    if stop.requested:
        return row
    if not math.isfinite(length):
        nothing = [encode(math.nan)] * k
        row |= {"values": nothing, "residuals": nothing, "converged": [False] * k}
        return row | {"trace": encode(math.nan), "trace_stderr": encode(math.nan)}
    found = eigsh(curvature, k, which, tol=tol, max_products=max_products, multiplicity=multiplicity, seed=seed)
    row |= {
        "values": found.values.double().tolist(),
        "residuals": found.residuals.double().tolist(),
        "converged": found.converged.tolist(),
        "products": found.products,
    }
    if trace_probes and not stop.requested:
        estimate = trace(curvature, probes=trace_probes, seed=seed)
        row |= {"trace": estimate.value, "trace_stderr": estimate.stderr, "products": found.products + trace_probes}
    return row


class _Table:
    """Rows on their way to a result."""

    def __init__(self, k: int, traced: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self._k = k
        self._traced = traced
        self._names: list[str] = []
        self._steps: list[float | None] = []
        self._units: set[str] = set()

    def add(self, source: Source, step: float | None, unit: str, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._names.append(source.name)
        self._steps.append(step)
        self._units.add(unit)

    def result(self, *, interrupted: bool) -> TrainingSpectrumResult:
        known = [step for step in self._steps if step is not None]
        # Steps of some only, or steps here and epochs there, are on no common axis.
        common = len(known) == len(self._steps) and len(self._units) == 1
        return TrainingSpectrumResult(
            steps=torch.tensor(known if common else list(range(len(self.rows))), dtype=torch.float64),
            unit=next(iter(self._units)) if common else "checkpoint",
            names=tuple(self._names),
            losses=self._column("loss"),
            gradient_norms=self._column("gradient_norm"),
            values=self._columns("values"),
            residuals=self._columns("residuals"),
            converged=torch.tensor([row["converged"] for row in self.rows], dtype=torch.bool).view(-1, self._k),
            traces=self._column("trace") if self._traced else None,
            trace_stderrs=self._column("trace_stderr") if self._traced else None,
            products=sum(row["products"] for row in self.rows),
            interrupted=interrupted,
        )

    def _column(self, name: str) -> Tensor:
        return torch.tensor([decode(row[name]) for row in self.rows], dtype=torch.float64)

    def _columns(self, name: str) -> Tensor:
        return torch.tensor([[decode(value) for value in row[name]] for row in self.rows], dtype=torch.float64).view(
            -1, self._k
        )
