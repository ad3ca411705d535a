"""The Hessian of a loss as a linear operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.operators.base import BatchGraph, CurvatureOperator, Engine
from kronfac.operators.data import Batch, BatchSize
from kronfac.operators.options import EngineOptions
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
    chunk_size: int | None = None,
    memory_limit: int | None = None,
    batch_norm: str = "running",
    dtype: torch.dtype | str | None = None,
    distributed: Any = True,
) -> CurvatureOperator:
    """The Hessian of the loss over all the data, with respect to the chosen parameters.

    Products are exact, Hv = ∇(gᵀv) by differentiating twice (Pearlmutter 1994). The model is run in eval mode: dropout
    is off and batch normalisation uses its running statistics, unless `batch_norm` says otherwise. Mode, buffers,
    `.grad`, hooks and all random streams are as before after every call. Autocast is switched off, attention runs on
    torch's own formula (the fused kernels have no second derivative).

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
            input is not it (padded tokens: the number of tokens that the loss averages over; weighted examples: the sum
            of their weights).
        keep_graph: keep the differentiated graph between products: faster, for the memory of the activations. Default:
            for a single batch that is not cut by `chunk_size`; with a `memory_limit`, for as many chunks as fit into
            it. True: for every batch of a list. False: never.
        chunk_size: the most examples that are run at once; larger batches are cut along the leading dimension of every
            tensor that has as many entries there as the first input, and the chunks weighted by what they count for.
        memory_limit: bytes that the graphs and a product with them may take at once, vectors and data apart; batches
            are cut so that they fit. What examples take is measured (tensors alive at once, forward and both
            derivatives; not the workspaces of single kernels), anew for each shape of example.
        batch_norm: "running" normalises by the running statistics, as the model does in eval mode; "batch" by those of
            the batch, through which the derivatives go, as in train mode. Only for a single batch that is not cut; the
            running statistics stay as they are.
        dtype: run the model in this type: parameters, buffers, inputs and targets of floating point are converted, on
            copies. torch.float64 certifies what float32 found. Default: the model's own types, but float32 instead of
            half precision, whose round-off would drown the curvature. "model": the model's own types, as they are.
            Vectors and sums over batches are float32 at least.
        distributed: with True, where a torch.distributed process group of several ranks is up, each rank passes its own
            share of the data (of any size, also none) and the operator is that of all the data: every rank makes the
            same calls with the same vectors, which is checked. A process group instead of the default one, or False for
            this process alone.

    Returns:
        The operator, at the parameters the model has at each product.

    Raises:
        TypeError: an argument of the wrong type, an iterator that can be read only once.
        ValueError: unknown or foreign parameters; no data; a loader that shuffles; a batch normalisation by the
            statistics of the batch over several batches, chunks or ranks; a loss that is not scalar, not finite,
            random, independent of the chosen parameters or, where a batch is cut, no mean (sum) over examples; an
            example that takes more than `memory_limit`; ranks that differ in more than their data.
        RuntimeError: the loss cannot be differentiated twice; another rank failed.
    """
    engine = _HessianEngine(
        model,
        loss_fn,
        data,
        params,
        EngineOptions(reduction, batch_size, keep_graph, chunk_size, memory_limit, batch_norm, dtype, distributed),
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
