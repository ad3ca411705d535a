"""Which parameters an operator acts on, and how a flat vector is laid out over them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


@dataclass(frozen=True, eq=False)
class ParameterLayout:
    """Names and shapes of the chosen parameters; a flat vector is their concatenation, each in row-major order.

    Attributes:
        names: as in `model.named_parameters()`.
        shapes: one per name.
        offsets: where each starts in the flat vector; one more entry than names, the last being n.
        dtype: of flat vectors: float64 if a parameter is float64, else float32 (also for half-precision parameters).
        device: of flat vectors: that of the first parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """n, the number of parameter entries."""
        return self.offsets[-1]

    def split(self, vector: Tensor, references: Sequence[Tensor]) -> list[Tensor]:
        """Cut a flat vector (n,) into parts shaped and typed like the parameters, on their devices."""
        return [
            vector[first:last].view(shape).to(device=reference.device, dtype=reference.dtype)
            for first, last, shape, reference in zip(
                self.offsets[:-1], self.offsets[1:], self.shapes, references, strict=True
            )
        ]

    def add_(self, out: Tensor, parts: Sequence[Tensor | None], scale: float) -> None:
        """Add scale times the parts to a flat vector in place; None counts as zero."""
        for first, last, part in zip(self.offsets[:-1], self.offsets[1:], parts, strict=True):
            if part is not None:
                flat = part.detach().reshape(-1).to(device=out.device, dtype=out.dtype)
                out[first:last].add_(flat, alpha=scale)

    def assign_(self, out: Tensor, parts: Sequence[Tensor | None], scale: float) -> None:
        """Write scale times the parts to a flat vector, whatever it holds; None counts as zero."""
        for first, last, shape, part in zip(self.offsets[:-1], self.offsets[1:], self.shapes, parts, strict=True):
            if part is None:
                out[first:last].zero_()
            else:
                out[first:last].view(shape).copy_(part.detach())
        if scale != 1.0:
            out.mul_(scale)

    def subset(self, indices: Sequence[int]) -> ParameterLayout:
        """The layout of some of the parameters, in the given order."""
        return make_layout(
            [self.names[index] for index in indices],
            [self.shapes[index] for index in indices],
            self.dtype,
            self.device,
        )


def make_layout(
    names: Sequence[str], shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> ParameterLayout:
    """Lay the given parameters out one after the other."""
    offsets = [0]
    for shape in shapes:
        offsets.append(offsets[-1] + shape.numel())
    return ParameterLayout(tuple(names), tuple(shapes), tuple(offsets), dtype, device)


def select_parameters(
    model: nn.Module, params: Iterable[str | Tensor] | None, caller: str
) -> tuple[dict[str, Tensor], ParameterLayout]:
    """Resolve the `params` argument.

    Args:
        model: the model.
        params: None for all parameters that require grad; else names of parameters or of modules (all parameters
            below), or the parameter tensors themselves. Frozen parameters may be named.
        caller: the public function that error messages name.

    Returns:
        The chosen parameters by name, in the order asked for, and their layout.

    Raises:
        TypeError: an entry is neither a name nor a tensor, or a parameter is not real floating-point.
        ValueError: unknown, foreign or repeated parameter, nothing chosen, or a lazy parameter without shape yet.
    """
    available: dict[str, Tensor] = dict(model.named_parameters())
    if params is None:
        chosen = {name: parameter for name, parameter in available.items() if parameter.requires_grad}
        if not chosen:
            raise ValueError(f"{caller}: model: no parameter requires grad; unfreeze some or name them in params=[...]")
    else:
        chosen = _resolve(available, params, caller)
    for name, parameter in chosen.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{caller}: parameter {name} has no shape yet; run a forward pass of the lazy model first")
        if not parameter.dtype.is_floating_point:
            raise TypeError(f"{caller}: parameter {name}: expected a real floating-point type, got {parameter.dtype}")
    if not any(parameter.numel() for parameter in chosen.values()):
        raise ValueError(f"{caller}: params: the chosen parameters have no entries")
    wide = any(parameter.dtype == torch.float64 for parameter in chosen.values())
    layout = make_layout(
        list(chosen),
        [parameter.shape for parameter in chosen.values()],
        torch.float64 if wide else torch.float32,
        next(iter(chosen.values())).device,
    )
    return chosen, layout


def _resolve(available: Mapping[str, Tensor], params: Any, caller: str) -> dict[str, Tensor]:
    if isinstance(params, str | Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            f"{caller}: params: expected a list of parameter names or tensors, got {type(params).__name__}; "
            "wrap a single one in a list"
        )
    # Tied parameters have several names; named_parameters gives the first, and identity finds it from the tensor.
    by_identity = {id(parameter): name for name, parameter in available.items()}
    names: list[str] = []
    for entry in params:
        if isinstance(entry, Tensor):
            if id(entry) not in by_identity:
                raise ValueError(
                    f"{caller}: params: a tensor of shape {tuple(entry.shape)} is not a parameter of the model; "
                    "pass the model's own parameters or their names"
                )
            names.append(by_identity[id(entry)])
        elif isinstance(entry, str):
            found = [name for name in available if name == entry or name.startswith(entry + ".")]
            if not found:
                close = difflib.get_close_matches(entry, available, n=3)
                hint = f"; close: {', '.join(close)}" if close else "; see model.named_parameters()"
                raise ValueError(f"{caller}: params: the model has no parameter or module {entry!r}{hint}")
            names += found
        else:
            raise TypeError(f"{caller}: params: expected names or tensors, got {type(entry).__name__}")
    if not names:
        raise ValueError(f"{caller}: params: expected at least one parameter, got none; pass None for all")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{caller}: params: chosen more than once: {', '.join(repeated)}")
    return {name: available[name] for name in names}
