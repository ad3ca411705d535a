"""The Hessian of a loss as a linear operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.operators.base import BatchGraph, CurvatureOperator, Engine
from kronfac.operators.data import Batch, BatchSize
from kronfac.operators.program import LossFunction, differentiate, refuse_constant


def hessian(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    params: Iterable[str | Tensor] | None = None,
    *,
    reduction: str = "mean",
    batch_size: BatchSize | None = None,
    keep_graph: bool | None = None,
) -> CurvatureOperator:
    """The Hessian of the loss over all the data, with respect to the chosen parameters.

    Products are exact, Hv = ∇(gᵀv) by differentiating twice (Pearlmutter 1994). The model is run in eval mode: dropout
    is off and batch normalisation uses its running statistics. Mode, buffers, `.grad`, hooks and all random streams
    are as before after every call. Autocast is switched off.

    Args:
        model: the model.
        loss_fn: called as loss_fn(output, targets), returns a scalar. Penalties on the parameters count if they take
            them from model.parameters() when called.
        data: one batch as a tuple (inputs, targets), a list of batches, or a DataLoader without shuffling. Inputs are a
            tensor, a tuple or list (positional arguments) or a dict (keyword arguments). Every product reads a loader
            once; its data are compared with the first pass.
        params: None for all parameters that require grad, or a list of names of parameters or modules, or tensors.
        reduction: what loss_fn does over a batch. "mean": the operator is the Hessian of the mean loss over all
            examples, batches weighted by their number of examples. "sum": of the summed loss.
        batch_size: callable(inputs, targets) giving what a batch counts for, where the leading dimension of the first
            input is not it (padded tokens: the number of tokens that the loss averages over).
        keep_graph: keep the differentiated graph between products: faster, for the memory of the activations. Default:
            for a single batch. True: for every batch of a list. False: never.

    Returns:
        The operator, at the parameters the model has at each product.

    Raises:
        TypeError: an argument of the wrong type, an iterator that can be read only once.
        ValueError: unknown or foreign parameters; no data; a loader that shuffles; a batch normalisation without
            running statistics over several batches; a loss that is not scalar, not finite, random, or independent of
            the chosen parameters.
        RuntimeError: the loss cannot be differentiated twice.
    """
    engine = _HessianEngine(
        model,
        loss_fn,
        data,
        params,
        reduction=reduction,
        batch_size=batch_size,
        keep_graph=keep_graph,
        caller="kronfac.operators.hessian",
    )
    return CurvatureOperator(engine, tuple(range(len(engine.chosen))))


@dataclass(frozen=True, eq=False)
class _HessianGraph:
    leaves: list[Tensor]
    gradients: list[Tensor | None]

    def product(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor | None]:
        gradients = [self.gradients[index] for index in indices]
        return differentiate(gradients, [self.leaves[index] for index in indices], vectors)


class _HessianEngine(Engine):
    def build(self, batch: Batch, chosen: Mapping[str, Tensor]) -> BatchGraph:
        evaluation = self._program.evaluate(batch, chosen)
        if len(chosen) == len(self.chosen):
            refuse_constant(evaluation.loss, self.caller)
        one = torch.ones_like(evaluation.loss)
        gradients = differentiate([evaluation.loss], evaluation.leaves, [one], create_graph=True)
        return _HessianGraph(evaluation.leaves, gradients)
