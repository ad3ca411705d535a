"""The loss over all the data as a function of the parameters, without curvature: values and the gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.curvature import unrecorded
from kronfac.operators.base import generators_of
from kronfac.operators.data import Batch, BatchSize, DataSource, checksum
from kronfac.operators.isolation import (
    RandomStreams,
    accelerator_devices,
    differentiable_twice,
    evaluation_mode,
    preserved_streams,
    refuse_batch_statistics,
)
from kronfac.operators.parameters import select_parameters
from kronfac.operators.program import LossFunction, Program, differentiate, refuse_constant, refuse_wrapper


class MeanLoss:
    """The mean (or summed) loss over all the data at displaced parameters; the model is left as it was.

    In a process group every rank has the loss of its own data: nothing is summed.

    Args: as `kronfac.operators.hessian`, with the name of the public function for error messages.

    Attributes:
        chosen: the parameters that may be displaced, by name.
        layout: of flat vectors over them.

    Raises:
        TypeError, ValueError: as `kronfac.operators.hessian`; the loss need not be differentiable.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        params: Iterable[str | Tensor] | None,
        *,
        reduction: str,
        batch_size: BatchSize | None,
        caller: str,
    ) -> None:
        self.caller = caller
        self.model = refuse_wrapper(model, caller)
        if not callable(loss_fn):
            raise TypeError(f"{caller}: loss_fn: expected a callable (output, targets), got {type(loss_fn).__name__}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{caller}: reduction: expected "mean" or "sum", got {reduction!r}')
        self.chosen, self.layout = select_parameters(self.model, params, caller)
        self._reduction = reduction
        self._program = Program(self.model, loss_fn, caller, None)
        generators = {id(found): found for found in generators_of(data)}
        self._streams = RandomStreams(accelerator_devices(self.model), tuple(generators.values()))
        with preserved_streams(self._streams):
            self._source = DataSource(data, batch_size, caller)
        if not self._source.single:
            refuse_batch_statistics(self.model, caller)
        with self._isolated():
            # With a graph, which shows parameters that the model would keep using where they are.
            self._program.evaluate(next(self._batches())[0], self.chosen, twice=False)

    def value(self, offset: Tensor | None = None) -> float:
        """The loss with the parameters displaced; it may be infinite or NaN.

        Args:
            offset: flat vector (n,) of the layout's type, added to the chosen parameters; None for none.

        Raises:
            ValueError, TypeError: the data changed, or the loss is no real scalar or draws random numbers.
        """
        with self._isolated():
            shifted = {} if offset is None else self._shifted(offset)
            return sum(weight * self._program.value(batch, shifted) for batch, weight in self._batches())

    def gradient(self) -> tuple[float, Tensor]:
        """The loss and its gradient at the parameters, a flat vector (n,).

        Raises:
            ValueError, TypeError: the loss is not finite or depends on none of the chosen parameters, or the data
                changed.
        """
        total = 0.0
        gradient = torch.zeros(self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        with self._isolated():
            for batch, weight in self._batches():
                evaluation = self._program.evaluate(batch, self.chosen, twice=False)
                refuse_constant(evaluation.loss, self.caller)
                one = torch.ones_like(evaluation.loss)
                self.layout.add_(gradient, differentiate([evaluation.loss], evaluation.leaves, [one]), weight)
                total += weight * float(evaluation.loss.detach())
        return total, gradient

    def data_digest(self) -> str:
        """A hash of the content of the data, the same in another process."""
        with preserved_streams(self._streams):
            return self._source.digest()

    def _shifted(self, offset: Tensor) -> dict[str, Tensor]:
        offsets = self.layout.offsets
        return {
            # Half-precision parameters are displaced in float32, as the program runs them.
            name: (p.detach().to(self.layout.dtype) + offset[first:last].view(p.shape).to(p.device)).to(
                self._program.compute_type(p)
            )
            for (name, p), first, last in zip(self.chosen.items(), offsets[:-1], offsets[1:], strict=True)
        }

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        for _, batch in self._source.batches():
            yield batch, batch.size / self._source.total if self._reduction == "mean" else 1.0

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        with (
            preserved_streams(self._streams),
            evaluation_mode(self._program),
            differentiable_twice(self.model),  # the kernels of the operators, for the same arithmetic
            unrecorded(),
        ):
            yield


def model_digest(model: nn.Module) -> str:
    """A hash of all parameters and buffers of a model, names, types and bits, the same in another process."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}\n".encode())
    return digest.hexdigest()
