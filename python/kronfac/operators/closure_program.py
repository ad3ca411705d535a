"""A closure that evaluates a loss on sets of examples, as a function of the parameters that it is differentiated by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kronfac.curvature import unrecorded
from kronfac.operators.buffers import SeparateBuffers
from kronfac.operators.isolation import RandomStreams, kernels_differentiable_twice, preserved_streams
from kronfac.operators.parameters import ParameterLayout, make_layout
from kronfac.operators.program import differentiate, explained, graph_nodes, refuse_once_differentiable

Closure: TypeAlias = "Callable[[Tensor | None], Any]"
"""Called with the indices of examples (int64, on the CPU) or None for all of them; returns their mean loss, built by
autograd, or a pair (loss, outputs) of which the loss was computed from the outputs."""

Piece: TypeAlias = "tuple[Tensor | None, float]"
"""Indices of examples, None for all, and their share of the examples asked for."""


@dataclass(frozen=True, eq=False)
class ClosureValue:
    """What a closure returned.

    Attributes:
        loss: scalar, with its graph.
        outputs: that the loss was computed from; None where the closure returned the loss alone.
    """

    loss: Tensor
    outputs: Tensor | None


class ClosureProgram:
    """A closure as a function of its parameters: cut into chunks, run from fixed random numbers, its results checked.

    Every evaluation begins at the same positions of the random streams, so that all see the same dropout masks, and
    leaves streams and buffers as they were.

    Args:
        closure: called with indices or None.
        parameters: that the loss is differentiated with respect to; frozen ones have the derivative zero.
        examples: how many there are; None where the closure is only asked for all of them.
        chunk_size: the most examples handed to the closure at once, None for no limit; needs `examples` for sets given
            as None.
        names: of the parameters; None numbers them.
        caller: the public function that error messages name.

    Attributes:
        layout: of flat vectors over the parameters.
        references: what parts of flat vectors are typed like.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Iterable[Tensor],
        *,
        examples: int | None = None,
        chunk_size: int | None = None,
        names: Sequence[str] | None = None,
        caller: str,
    ) -> None:
        if not callable(closure):
            raise TypeError(f"{caller}: closure: expected a callable of indices, got {type(closure).__name__}")
        self.closure, self.caller = closure, caller
        self.parameters = list(parameters)
        self.examples, self.chunk_size = examples, chunk_size
        self.layout = layout_of(self.parameters, names, caller)
        self.references = [parameter.detach() for parameter in self.parameters]
        self.devices = accelerators(self.parameters)
        self.streams = RandomStreams(self.devices)  # every evaluation begins here
        self.buffers = SeparateBuffers()
        self._graph_checked = False
        self._after: RandomStreams | None = None

    def count(self, indices: Tensor | None) -> int:
        """How many examples a set has; 1 stands for all where their number is unknown."""
        return (self.examples or 1) if indices is None else len(indices)

    def pieces(self, indices: Tensor | None) -> list[Piece]:
        """Cut a set of examples into chunks of nearly equal size, as batch normalisation needs them."""
        limit, total = self.chunk_size, self.count(indices)
        if limit is None or total <= limit:
            return [(indices, 1.0)]
        everything = torch.arange(total) if indices is None else indices
        return [(piece, len(piece) / total) for piece in everything.tensor_split(-(-total // limit))]

    def evaluate(self, piece: Tensor | None, *, differentiable: bool = True) -> ClosureValue:
        """Call the closure, inside `isolated`.

        Args:
            piece: indices or None.
            differentiable: refuse a loss that is not finite or has no graph.

        Raises:
            TypeError, ValueError: what came back is no scalar loss or no pair (loss, outputs).
        """
        returned = self.closure(piece)
        where = f"{self.caller}: closure"
        outputs = None
        loss = returned
        if isinstance(returned, tuple | list):
            if len(returned) != 2:
                raise ValueError(f"{where}: expected a loss or a pair (loss, outputs), got {len(returned)} values")
            loss, outputs = returned
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"{where}: outputs: expected one tensor, got {type(outputs).__name__}; join several with torch.cat "
                    "and compute the loss from the result"
                )
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{where}: expected a loss with its graph, a scalar tensor, got {type(loss).__name__}; return the loss "
                "itself, without .item() and backward()"
            )
        if loss.numel() != 1 or not loss.dtype.is_floating_point:
            raise ValueError(
                f"{where}: expected a real scalar, the mean loss over the examples, got {loss.dtype} of shape "
                f"{tuple(loss.shape)}"
            )
        if differentiable:
            self._check_differentiable(loss)
        return ClosureValue(loss.reshape(()), outputs)

    def _check_differentiable(self, loss: Tensor) -> None:
        where = f"{self.caller}: closure"
        if not bool(torch.isfinite(loss)):
            broken = [
                name
                for name, parameter in zip(self.layout.names, self.parameters, strict=True)
                if not bool(torch.isfinite(parameter.detach()).all())
            ]
            why = f"{', '.join(broken[:5])} hold NaN or infinity" if broken else "all parameters are finite"
            raise ValueError(f"{where}: expected a finite loss, got {loss.item()}; {why}")
        if not loss.requires_grad:
            raise ValueError(
                f"{where}: the loss depends on none of the optimized parameters (is it detached, computed under "
                "no_grad, or of another model?)"
            )
        if not self._graph_checked:
            refuse_once_differentiable(graph_nodes([loss]), self.caller)
            self._graph_checked = True

    def value(self, indices: Tensor | None) -> float:
        """The mean loss over a set of examples, which may be infinite or NaN."""
        total = 0.0
        with self.isolated():
            for piece, weight in self.pieces(indices):
                # With its graph: a closure may differentiate inside, for a penalty on gradients.
                total += weight * float(self.evaluate(piece, differentiable=False).loss.detach())
        return total

    def gradient(self, indices: Tensor | None, *, keep: bool = False) -> tuple[float, Tensor]:
        """The mean loss over a set of examples and its gradient, a flat vector (n,).

        Args:
            indices: of the examples, None for all.
            keep: later evaluations see what this one writes to buffers, and `finish` leaves buffers and streams as it
                does.

        Raises:
            TypeError, ValueError: as `evaluate`, and a gradient that is not finite.
        """
        total = 0.0
        gradient = torch.zeros(self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        with self.isolated(keep=keep):
            for piece, weight in self.pieces(indices):
                value = self.evaluate(piece)
                one = torch.ones_like(value.loss)
                with self.explained():
                    parts = self.differentiate([value.loss], [one], retain_graph=False)
                self.layout.add_(gradient, parts, weight)
                total += weight * float(value.loss.detach())
            if keep:
                self._after = self.streams.now()
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(
                f"{self.caller}: closure: the gradient is not finite although the loss, {total:g}, is: a derivative is "
                "infinite (a square root or norm at 0?) or overflows"
            )
        return total, gradient

    def finish(self) -> None:
        """Leave buffers and random streams as the evaluation of the gradient with `keep` made them."""
        self.buffers.write_back()
        if self._after is not None:
            self._after.restore()

    def differentiate(
        self,
        outputs: Sequence[Tensor | None],
        vectors: Sequence[Tensor],
        *,
        create_graph: bool = False,
        retain_graph: bool = True,
    ) -> list[Tensor | None]:
        """Vector-Jacobian product with respect to the parameters; None for those that are unused or frozen."""
        live = [index for index, parameter in enumerate(self.parameters) if parameter.requires_grad]
        found = differentiate(
            outputs,
            [self.parameters[index] for index in live],
            vectors,
            create_graph=create_graph,
            retain_graph=retain_graph,
        )
        result: list[Tensor | None] = [None] * len(self.parameters)
        for index, part in zip(live, found, strict=True):
            result[index] = part
        return result

    @contextmanager
    def isolated(self, *, keep: bool = False) -> Iterator[None]:
        """From the start of the random streams, with buffers set apart and kernels that can be differentiated twice."""
        with ExitStack() as stack:
            stack.enter_context(preserved_streams(self.streams))
            stack.enter_context(self.buffers.kept() if keep else self.buffers.dropped())
            stack.enter_context(kernels_differentiable_twice(self.devices))
            stack.enter_context(unrecorded())
            if "torch._dynamo" in sys.modules:
                # What was compiled has no second derivative: it runs as it was written.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say what to do when autograd refuses a derivative of what the closure returned.

        Raises:
            RuntimeError: with the remedy, instead of autograd's.
        """
        try:
            with explained(self.caller):
                yield
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise RuntimeError(
                f"{self.caller}: closure: its graph is gone; return the loss without calling backward() on it, and "
                "build the graph anew in every call"
            ) from error


def layout_of(parameters: Sequence[Tensor], names: Sequence[str] | None, caller: str) -> ParameterLayout:
    """Lay parameters out in a flat vector, float64 if one of them is, else float32.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: none of them has entries.
    """
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor) or not parameter.dtype.is_floating_point:
            got = parameter.dtype if isinstance(parameter, Tensor) else type(parameter).__name__
            raise TypeError(f"{caller}: parameter {index}: expected a real floating-point tensor, got {got}")
    if not any(parameter.numel() for parameter in parameters):
        raise ValueError(f"{caller}: parameters: expected at least one with entries")
    if names is not None and (len(names) != len(parameters) or len(set(names)) < len(names)):
        raise ValueError(f"{caller}: names: expected {len(parameters)} different ones, got {list(names)}")
    wide = any(parameter.dtype == torch.float64 for parameter in parameters)
    return make_layout(
        [str(index) for index in range(len(parameters))] if names is None else list(names),
        [parameter.shape for parameter in parameters],
        torch.float64 if wide else torch.float32,
        parameters[0].device,
    )


def accelerators(parameters: Iterable[Tensor]) -> tuple[torch.device, ...]:
    """The devices other than the CPU that hold parameters."""
    found = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}
    return tuple(sorted(found, key=str))


def check_indices(indices: Any, examples: int | None, caller: str) -> None:
    """Check a set of examples.

    Raises:
        TypeError: no int64 tensor on the CPU.
        ValueError: empty, not one-dimensional or out of range.
    """
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.device.type != "cpu":
        raise TypeError(f"{caller}: indices: expected an int64 tensor on the CPU or None, got {indices!r:.80}")
    if indices.dim() != 1 or not len(indices):
        raise ValueError(f"{caller}: indices: expected a vector with entries, got shape {tuple(indices.shape)}")
    if int(indices.min()) < 0 or (examples is not None and int(indices.max()) >= examples):
        raise ValueError(
            f"{caller}: indices: expected 0 to {'...' if examples is None else examples - 1}, got {indices}"
        )
