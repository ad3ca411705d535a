"""The loss along one direction or over the plane of two in the space of the parameters."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kronfac.linalg.lanczos import Float64Array, norm
from kronfac.linalg.trace import StoppedError
from kronfac.operators.data import BatchSize, checksum
from kronfac.operators.hessian import hessian
from kronfac.operators.mean_loss import MeanLoss, model_digest
from kronfac.operators.program import LossFunction
from kronfac.spectrum._guard import breakable
from kronfac.spectrum._interrupt import interruptible
from kronfac.spectrum._options import Progress, check_count, check_positive
from kronfac.spectrum._progress import shown
from kronfac.spectrum._resume import ResumeFile, decode, encode
from kronfac.spectrum.directions import read_directions
from kronfac.spectrum.landscape_result import LandscapeResult

_CALLER = "kronfac.spectrum.landscape"
_POINTS = {1: 51, 2: 21}
_CENTRE = "centre"

Grid = Tensor | npt.NDArray[np.floating[Any]] | Sequence[float]


def landscape(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    directions: Tensor | Sequence[Any],
    *,
    params: Iterable[str | Tensor] | None = None,
    radius: float | tuple[float, float] = 1.0,
    points: int | tuple[int, int] | None = None,
    grid: Grid | tuple[Grid, Grid] | None = None,
    labels: Sequence[str] | None = None,
    reduction: str = "mean",
    batch_size: BatchSize | None = None,
    curvature: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> LandscapeResult:
    """Evaluate the loss at θ + a d₁, or θ + a d₁ + b d₂, on a grid of coordinates around the model's parameters θ.

    Forward passes only; the loss need not be differentiable. The model runs in eval mode (batch normalisation on the
    running statistics of θ, dropout off, autocast off, half precision as float32) on displaced copies of its
    parameters: mode, buffers, `.grad`, hooks and all random streams are as before. In a process group every rank has
    the landscape of its own data.

    Args:
        model: the model.
        loss_fn: called as loss_fn(output, targets), returns a scalar.
        data: one batch (inputs, targets), a list of batches or a DataLoader without shuffling, which is read once per
            point; or a dict of several of these by name, {"train": ..., "test": ...}.
        directions: one or two directions over the chosen parameters, used as they are: columns of
            `EigenResult.vectors`, those of `random_directions`, flat vectors (n,), or lists of tensors shaped like the
            parameters.
        params: which parameters the directions are of, as in `kronfac.operators.hessian`.
        radius: the coordinates reach from -radius to radius (one number, or one per direction). In units of the
            direction: for a unit eigenvector a distance, for a filter-normalised direction a share of the weights.
        points: coordinates per direction, at least 2 (default: 51 for one direction, 21 for each of two). An odd number
            contains θ itself.
        grid: the coordinates themselves, ascending, instead of radius and points; a pair of such for two directions.
        labels: names of the directions in plots.
        reduction: what loss_fn does over a batch. "mean": the mean over all examples is given, batches weighted by
            their number of examples. "sum": the sum.
        batch_size: callable(inputs, targets) giving what a batch counts for (default: its leading dimension).
        curvature: also compute slopes gᵀd and curvatures dᵀHd at θ, one gradient and one Hessian-vector product per
            direction and data set, for a loss that can be differentiated twice.
        checkpoint: a file that keeps what is done. Where it exists it is taken up, and the result is bit for bit that
            of a run without interruption; but only if model, data, directions, grid and options are the same, and the
            loss at θ, which is computed again, too. It is written every few seconds, and at the end of any kind.
        progress: called as progress(points done, points in all); True for a progress bar.

    Returns:
        The losses by data set. Points where the loss overflows hold infinity or NaN. An interrupt (Ctrl-C) ends the
        work with what has been computed, from θ outwards, marked as interrupted.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: directions that do not fit the parameters; a loss that at θ is not finite, not scalar or random;
            data as refused by `kronfac.operators.hessian`; an option out of range; a checkpoint of something else.
        OSError: the checkpoint cannot be read or written.
        KeyboardInterrupt: before the first point has been computed, or the second one.
    """
    sets = _named(data)
    losses = {
        name: MeanLoss(model, loss_fn, one, params, reduction=reduction, batch_size=batch_size, caller=_CALLER)
        for name, one in sets.items()
    }
    surface = next(iter(losses.values()))
    rows = read_directions(directions, surface.layout, _CALLER)
    axes = _axes(len(rows), radius, points, grid)
    names = _check_labels(labels, len(rows))
    coordinates = list(itertools.product(*(axis.tolist() for axis in axes)))
    record = ResumeFile(
        checkpoint,
        "kronfac landscape",
        {} if checkpoint is None else _settings(surface.model, losses, rows, axes, reduction),
        _CALLER,
    )
    values: dict[str, Float64Array] = {name: np.full(len(coordinates), np.nan) for name in losses}
    evaluated = np.zeros(len(coordinates), dtype=bool)
    evaluations = 0
    with interruptible() as stop, shown(progress, _CALLER, "point") as report:
        try:
            try:
                with breakable(stop):
                    centre = {name: one.value() for name, one in losses.items()}
                    evaluations += len(losses)
                    _check_centre(record, centre)
                    quadratic = _quadratic_model(
                        surface.model, loss_fn, sets, losses, rows, reduction, batch_size, curvature
                    )
            except StoppedError as error:
                raise KeyboardInterrupt from error
            for done, index in enumerate(_outwards(axes), start=1):
                found = record.done.get(str(index))
                if found is None:
                    if stop.stops(done - 1):
                        break
                    if any(coordinates[index]):
                        offset = sum(a * row for a, row in zip(coordinates[index], rows, strict=True))
                        assert isinstance(offset, Tensor)
                        try:
                            with breakable(stop):
                                point = {name: one.value(offset) for name, one in losses.items()}
                        except StoppedError as error:
                            if done > 1:
                                break
                            raise KeyboardInterrupt from error
                        evaluations += len(losses)
                    else:
                        point = centre
                    record.put(str(index), {name: encode(value) for name, value in point.items()})
                    found = record.done[str(index)]
                for name in losses:
                    values[name][index] = decode(found[name])
                evaluated[index] = True
                if report is not None:
                    report(done, len(coordinates))
        finally:
            record.write()
    shape = tuple(len(axis) for axis in axes)
    return LandscapeResult(
        coordinates=tuple(torch.from_numpy(axis) for axis in axes),
        losses={name: torch.from_numpy(found.reshape(shape)) for name, found in values.items()},
        evaluated=torch.from_numpy(evaluated.reshape(shape)),
        centre=centre,
        lengths=tuple(norm(row) for row in rows),
        labels=names,
        slopes=None if quadratic is None else quadratic[0],
        curvatures=None if quadratic is None else quadratic[1],
        evaluations=evaluations,
        products=len(rows) * len(losses) if curvature else 0,
        interrupted=not evaluated.all(),
    )


def _named(data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        return {"loss": data}
    if not data or not all(isinstance(name, str) for name in data):
        raise ValueError(
            f"{_CALLER}: data: expected data sets by name, {{'train': ..., 'test': ...}}, got the keys {list(data)}"
        )
    return dict(data)


def _axes(
    count: int,
    radius: float | tuple[float, float],
    points: int | tuple[int, int] | None,
    grid: Any,
) -> tuple[Float64Array, ...]:
    """The coordinates along each direction."""
    if grid is not None:
        if points is not None or radius != 1.0:
            raise ValueError(f"{_CALLER}: grid: give either the coordinates or radius and points")
        grids = [grid] if count == 1 else grid
        if not isinstance(grids, list | tuple) or len(grids) != count:
            raise ValueError(f"{_CALLER}: grid: expected a pair of coordinates for two directions")
        return tuple(_check_grid(one) for one in grids)
    radii = [check_positive(one, "radius", _CALLER) for one in _pair(radius, count, "radius")]
    numbers = [
        check_count(one, "points", _CALLER, least=2)
        for one in _pair(_POINTS[count] if points is None else points, count, "points")
    ]
    # Symmetric to the last bit, and exactly zero in the middle.
    steps = [np.arange(1 - number, number, 2, dtype=np.float64) / (number - 1) for number in numbers]
    return tuple(one * step for one, step in zip(radii, steps, strict=True))


def _pair(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, tuple | list):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{_CALLER}: {name}: expected one number, or one for each of {count} directions, got {value}")
    return list(value)


def _check_grid(grid: Any) -> Float64Array:
    try:
        array = grid.detach().cpu().numpy() if isinstance(grid, Tensor) else grid
        points = np.array(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_CALLER}: grid: expected numbers, got {type(grid).__name__}") from error
    if points.ndim != 1 or len(points) < 2 or not np.isfinite(points).all() or not (np.diff(points) > 0).all():
        raise ValueError(
            f"{_CALLER}: grid: expected at least two finite, strictly ascending coordinates (g,) per direction, got "
            f"shape {points.shape}"
        )
    return points


def _check_labels(labels: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if labels is None:
        return ("along the direction",) if count == 1 else ("along the first direction", "along the second direction")
    if isinstance(labels, str) or len(labels) != count or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{_CALLER}: labels: expected {count} strings, one per direction, got {labels!r}")
    return tuple(labels)


def _settings(
    model: nn.Module,
    losses: Mapping[str, MeanLoss],
    rows: Tensor,
    axes: Sequence[Float64Array],
    reduction: str,
) -> dict[str, Any]:
    """What has to agree for a point of one run to be that of another."""
    first = next(iter(losses.values()))
    return {
        "the model (parameters and buffers)": model_digest(model),
        "the chosen parameters": list(first.layout.names),
        "the directions": [f"{row.dtype} {checksum(row)}" for row in rows],
        "the grid": [axis.tolist() for axis in axes],
        "reduction": reduction,
        "the data": {name: one.data_digest() for name, one in losses.items()},
    }


def _check_centre(record: ResumeFile, centre: Mapping[str, float]) -> None:
    """Compare the loss at the centre with the file's: it tells another loss function, or another arithmetic."""
    for name, value in centre.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{_CALLER}: data: the {name if name == 'loss' else name + ' loss'} at the model's own parameters is "
                f"{value}; check data and parameters for NaN or infinity"
            )
    saved = record.done.get(_CENTRE)
    if saved is None:
        record.put(_CENTRE, {name: encode(value) for name, value in centre.items()})
        return
    for name, value in centre.items():
        if decode(saved[name]) != value:
            raise record.refuse(
                f"the loss at the centre ({name}) was {saved[name]!r} and is {value!r} now (another loss_fn, "
                "batch_size, number of threads, or version of torch?)"
            )


def _outwards(axes: Sequence[Float64Array]) -> list[int]:
    """Indices of the points by their distance from the centre: an interrupted run has what is around it."""
    scaled = [axis / np.abs(axis).max() for axis in axes]
    distance = sum(part**2 for part in np.meshgrid(*scaled, indexing="ij"))
    order: list[int] = np.argsort(np.asarray(distance).reshape(-1), kind="stable").tolist()
    return order


def _quadratic_model(
    model: nn.Module,
    loss_fn: LossFunction,
    sets: Mapping[str, Any],
    losses: Mapping[str, MeanLoss],
    rows: Tensor,
    reduction: str,
    batch_size: BatchSize | None,
    wanted: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Slopes gᵀd and curvatures dᵀHd of each data set at the centre, float64."""
    if not wanted:
        return None
    slopes, curvatures = {}, {}
    for name, data in sets.items():
        chosen = list(losses[name].layout.names)
        matrix = hessian(model, loss_fn, data, chosen, reduction=reduction, batch_size=batch_size, distributed=False)
        images = matrix @ rows.mT
        slopes[name] = (rows.double() @ losses[name].gradient()[1].double()).cpu()
        curvatures[name] = (rows.double() @ images.double()).cpu()
    return slopes, curvatures
