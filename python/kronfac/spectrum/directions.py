"""Directions in the space of the parameters, along which a landscape is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from kronfac.linalg.lanczos import norm
from kronfac.linalg.probes import make_generator
from kronfac.operators.parameters import ParameterLayout, select_parameters
from kronfac.operators.program import refuse_wrapper
from kronfac.spectrum._options import check_count

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Two directions that differ by less span a line and not a plane.
_PARALLEL = 1e-6


def random_directions(
    model: nn.Module,
    count: int = 2,
    seed: int = 0,
    *,
    filter_normalised: bool = True,
    params: Iterable[str | Tensor] | None = None,
) -> Tensor:
    """Draw random Gaussian directions for `landscape`.

    With `filter_normalised` as in Li, Xu, Taylor, Studer & Goldstein, "Visualizing the loss landscape of neural nets"
    (2018, arXiv:1712.09913, section 4): each filter of a direction gets the norm of the same filter of the model, so
    that a distance means the same for networks whose layers are scaled differently. A filter is the weights of one
    output: the first index of a weight, the second one of a transposed convolution's. Biases and the parameters of
    normalisations (and all others of at most one dimension) do not move.

    Args:
        model: the model.
        count: number of directions.
        seed: of the directions; equal seeds give equal directions.
        filter_normalised: False for unit vectors in which every parameter moves.
        params: as in `kronfac.operators.hessian`; give the same to `landscape`.

    Returns:
        The directions as columns (n, count), as eigenvectors are, of the operators' type and on their device. Nearly
        orthogonal where n is large, and left so.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown parameters, or none that moves, an option out of range, or weights that are not finite.
    """
    caller = "kronfac.spectrum.random_directions"
    module = refuse_wrapper(model, caller)
    count = check_count(count, "count", caller, least=1)
    generator = make_generator(seed, caller)
    chosen, layout = select_parameters(module, params, caller)
    columns = torch.empty(count, layout.size, dtype=layout.dtype, device=layout.device)
    owners = {id(p): owner for owner in module.modules() for p in owner._parameters.values() if p is not None}
    for column in columns:
        parts: list[Tensor | None] = []
        for parameter in chosen.values():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=layout.dtype)
            if filter_normalised:
                drawn = _normalised(drawn, parameter.detach().to("cpu", layout.dtype), owners.get(id(parameter)))
            parts.append(drawn)
        column.zero_()
        layout.add_(column, parts, 1.0)
        length = norm(column)
        if filter_normalised and length == 0.0:
            raise ValueError(
                f"{caller}: params: none of the chosen parameters has filters to move (biases and the parameters of "
                "normalisations are left out); choose weights, or filter_normalised=False"
            )
        if not torch.isfinite(column).all():
            raise ValueError(f"{caller}: model: the weights contain NaN or infinity")
        if not filter_normalised:
            column /= length
    return columns.mT


def _normalised(drawn: Tensor, weight: Tensor, owner: nn.Module | None) -> Tensor:
    """A draw with the norms of the weight's filters; zero for what has none."""
    if weight.ndim <= 1 or isinstance(owner, _NORMS):
        return torch.zeros_like(drawn)
    tiny = torch.finfo(drawn.dtype).tiny
    return drawn * (_filter_norms(weight, owner) / _filter_norms(drawn, owner).clamp_min(tiny))


def _filter_norms(weight: Tensor, owner: nn.Module | None) -> Tensor:
    """The norm of the filter that each entry belongs to, in a shape that broadcasts to the weight's."""
    norms: Tensor
    if not isinstance(owner, _ConvTransposeNd):
        norms = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
        return norms
    # (in, out / groups, ...): the outputs of a group share the inputs of that group.
    grouped = weight.reshape(owner.groups, -1, *weight.shape[1:])
    norms = torch.linalg.vector_norm(grouped, dim=(1, *range(3, grouped.ndim)), keepdim=True)
    return norms.expand(-1, grouped.shape[1], *norms.shape[2:]).flatten(0, 1)


def read_directions(directions: Any, layout: ParameterLayout, caller: str) -> Tensor:
    """Bring what a user may give into one form.

    Args:
        directions: a flat vector (n,), columns (n, 1) or (n, 2), tensors shaped like the parameters, or a list of one
            or two of these.
        layout: of the chosen parameters.
        caller: the public function that error messages name.

    Returns:
        One or two directions as rows, of the layout's type and on its device.

    Raises:
        TypeError: not tensors of a real floating-point type.
        ValueError: other shapes, more than two, zero, not finite, or parallel.
    """
    rows = torch.stack([_flat(found, layout, caller) for found in _single_directions(directions, layout, caller)])
    if not torch.isfinite(rows).all():
        raise ValueError(f"{caller}: directions: a direction contains NaN or infinity")
    lengths = [norm(row) for row in rows]
    if min(lengths) == 0.0:
        raise ValueError(f"{caller}: directions: a direction is zero; every point along it would be the same")
    if len(rows) == 2:
        first, second = (row.double() / length for row, length in zip(rows, lengths, strict=True))
        cosine = float(first @ second)
        if norm(second - cosine * first) < _PARALLEL:
            raise ValueError(f"{caller}: directions: the two are parallel and span no plane; pass one of them")
    return rows


def _single_directions(directions: Any, layout: ParameterLayout, caller: str) -> list[Any]:
    if isinstance(directions, Tensor):
        if directions.ndim == 2 and directions.shape[0] == layout.size:
            _check_number(directions.shape[1], caller, "; choose columns, vectors[:, :2]")
            return list(directions.mT)
        return [directions]
    if not isinstance(directions, list | tuple):
        raise TypeError(
            f"{caller}: directions: expected a vector (n,), columns (n, 2), tensors shaped like the parameters, or a "
            f"list of one or two such directions, got {type(directions).__name__}"
        )
    if all(isinstance(part, Tensor) for part in directions) and _fits(directions, layout):
        return [directions]
    _check_number(len(directions), caller, "")
    return list(directions)


def _check_number(count: int, caller: str, hint: str) -> None:
    if count not in (1, 2):
        raise ValueError(f"{caller}: directions: expected one or two directions, got {count}{hint}")


def _fits(parts: Sequence[Any], layout: ParameterLayout) -> bool:
    return [tuple(part.shape) for part in parts] == [tuple(shape) for shape in layout.shapes]


def _flat(direction: Any, layout: ParameterLayout, caller: str) -> Tensor:
    parts = [direction] if isinstance(direction, Tensor) else direction
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"{caller}: directions: expected a vector or a list of tensors shaped like the parameters, "
            f"got {type(direction).__name__}"
        )
    for part in parts:
        if not part.dtype.is_floating_point:
            raise TypeError(f"{caller}: directions: expected a real floating-point type, got {part.dtype}")
    if isinstance(direction, Tensor) and direction.shape != (layout.size,) and not _fits(parts, layout):
        raise ValueError(
            f"{caller}: directions: expected n = {layout.size} entries (the chosen parameters), "
            f"got shape {tuple(direction.shape)}"
        )
    if not isinstance(direction, Tensor) and not _fits(parts, layout):
        raise ValueError(
            f"{caller}: directions: expected tensors of the parameters' shapes "
            f"{[tuple(shape) for shape in layout.shapes]}, got {[tuple(part.shape) for part in parts]}"
        )
    return torch.cat([part.detach().reshape(-1).to(layout.device, layout.dtype) for part in parts])
