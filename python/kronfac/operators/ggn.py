"""The generalised Gauss-Newton matrix of a loss as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kronfac.operators.base import BatchGraph, CurvatureOperator, Engine
from kronfac.operators.data import Batch, BatchSize
from kronfac.operators.options import EngineOptions
from kronfac.operators.program import LossFunction, differentiate, refuse_constant


def ggn(
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
    """The generalised Gauss-Newton matrix E[Jᵀ H_L J] over all the data, with respect to the chosen parameters.

    J is the Jacobian of the model's output with respect to the parameters, H_L the Hessian of loss_fn with respect to
    the output (Schraudolph 2002). It is positive semi-definite when the loss is convex in the output, and for cross
    entropy and squared error it is the Fisher matrix. Jv is taken by differentiating Jᵀu with respect to u, so that
    no layer needs a forward mode. The model is run and left as by `kronfac.operators.hessian`.

    Args:
        model: the model; its output is a tensor or nested tuples, lists and dicts of tensors.
        loss_fn: called as loss_fn(output, targets), returns a scalar; it may depend on parameters through the output
            only.
        data: as in `kronfac.operators.hessian`.
        params: as in `kronfac.operators.hessian`.
        reduction: as in `kronfac.operators.hessian`.
        batch_size: as in `kronfac.operators.hessian`.
        keep_graph: as in `kronfac.operators.hessian`.
        chunk_size: as in `kronfac.operators.hessian`.
        memory_limit: as in `kronfac.operators.hessian`.
        batch_norm: as in `kronfac.operators.hessian`.
        dtype: as in `kronfac.operators.hessian`.
        distributed: as in `kronfac.operators.hessian`.

    Returns:
        The operator, at the parameters the model has at each product.

    Raises:
        TypeError: an argument or the model's output of the wrong type, an iterator that can be read only once.
        ValueError: as `kronfac.operators.hessian`; and a loss that depends on parameters other than through the output.
        RuntimeError: the model or the loss cannot be differentiated twice.
    """
    engine = _GgnEngine(
        model,
        loss_fn,
        data,
        params,
        EngineOptions(reduction, batch_size, keep_graph, chunk_size, memory_limit, batch_norm, dtype, distributed),
        caller="kronfac.operators.ggn",
    )
    return CurvatureOperator(engine, tuple(range(len(engine.chosen))))


Curve: TypeAlias = "Callable[[list[Tensor]], list[Tensor]]"
"""Multiplies a vector in the space of the outputs, in parts, with the curvature there."""


@dataclass(frozen=True, eq=False)
class _PushforwardGraph:
    leaves: list[Tensor]
    outputs: list[Tensor]
    cotangents: list[Tensor]  # u, at which the value does not matter: Jᵀu is linear in it
    pullbacks: list[Tensor | None]  # Jᵀu per leaf
    curve: Curve

    def product(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor | None]:
        pullbacks = [self.pullbacks[index] for index in indices]
        pushed = _filled(differentiate(pullbacks, self.cotangents, vectors), self.cotangents)
        return differentiate(self.outputs, [self.leaves[index] for index in indices], self.curve(pushed))


def pushforward_graph(outputs: list[Tensor], leaves: list[Tensor], curve: Curve) -> BatchGraph:
    """The matrix Jᵀ C J, J the derivative of the outputs with respect to the leaves.

    Args:
        outputs: with their graph to the leaves.
        leaves: stand-ins of the chosen parameters.
        curve: multiplies with C.
    """
    cotangents = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    pullbacks = differentiate(outputs, leaves, cotangents, create_graph=True)
    return _PushforwardGraph(leaves, outputs, cotangents, pullbacks, curve)


class _GgnEngine(Engine):
    def build(self, batch: Batch, chosen: Mapping[str, Tensor]) -> BatchGraph:
        evaluation = self._program.evaluate_split(batch, chosen)
        if len(chosen) == len(self.chosen):
            refuse_constant(evaluation.loss, self.caller)
        cuts = evaluation.cuts
        one = torch.ones_like(evaluation.loss)
        loss_gradients = differentiate([evaluation.loss], cuts, [one], create_graph=True)
        return pushforward_graph(
            evaluation.outputs,
            evaluation.leaves,
            lambda pushed: _filled(differentiate(loss_gradients, cuts, pushed), cuts),
        )


def _filled(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(reference) if part is None else part for part, reference in zip(parts, like, strict=True)]
