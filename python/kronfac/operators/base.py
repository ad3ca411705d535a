"""The linear operator that users hold, and the engine that computes its products batch by batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kronfac.curvature import unrecorded
from kronfac.linalg.finite import all_finite
from kronfac.linalg.lanczos import norm
from kronfac.linalg.probes import draw_probes, make_generator
from kronfac.operators.algebra import ParameterOperator
from kronfac.operators.chunks import Chunker
from kronfac.operators.convolution import BilinearConvolutions
from kronfac.operators.data import Batch, DataSource
from kronfac.operators.isolation import (
    RandomStreams,
    accelerator_devices,
    differentiable_twice,
    evaluation_mode,
    preserved_streams,
    refuse_batch_statistics,
    refuse_sparse_gradients,
    refuse_synchronised_statistics,
)
from kronfac.operators.memory import Usage, measure
from kronfac.operators.options import EngineOptions
from kronfac.operators.parameters import ParameterLayout, select_parameters
from kronfac.operators.program import LossFunction, Program, differentiate, explained, refuse_wrapper
from kronfac.operators.ranks import Ranks, bits


class BatchGraph(Protocol):
    """The curvature of one batch, ready for products."""

    def product(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply the diagonal block of the parameters at `indices` with one vector, given in parts; None is zero."""
        ...


class Engine(ABC):
    """Products of a curvature matrix with vectors, averaged over data; the model is left as it was.

    Args: as `kronfac.operators.hessian`, with the name of the public function for error messages.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        params: Iterable[str | Tensor] | None,
        options: EngineOptions,
        *,
        caller: str,
    ) -> None:
        self.caller = caller
        self.model = refuse_wrapper(model, caller)
        if not callable(loss_fn):
            raise TypeError(f"{caller}: loss_fn: expected a callable (output, targets), got {type(loss_fn).__name__}")
        options.check(caller)
        self._options = options
        self._reduction = options.reduction
        self.chosen, layout = select_parameters(self.model, params, caller)
        refuse_sparse_gradients(self.model, self.chosen.values(), caller)
        self._program = Program(self.model, loss_fn, caller, options.dtype)
        wide = any(self._program.compute_type(parameter) == torch.float64 for parameter in self.chosen.values())
        self.layout = replace(layout, dtype=torch.float64 if wide else torch.float32)
        # What vectors are converted to, parameter by parameter.
        self._references = [
            torch.empty(0, dtype=self._program.compute_type(parameter), device=parameter.device)
            for parameter in self.chosen.values()
        ]
        self._kept: dict[tuple[int, int], BatchGraph] = {}
        self._state: Any = None
        self._ranks = Ranks(options.distributed, self.layout.device, caller)
        with self._ranks.together(self._shared(tuple(range(len(self.chosen))))):
            self._read(data)
        self._total = self._ranks.total(self._source.total)
        if self._total <= 0:
            raise ValueError(f"{caller}: data: expected at least one example, got none on any rank")
        self._first_number = self._ranks.before(self._source.count)
        with self._ranks.together():
            self._plan()
            self._check_first_batch()

    def _read(self, data: Any) -> None:
        caller, options = self.caller, self._options
        generators = {id(found): found for found in generators_of(data)}
        self._streams = RandomStreams(accelerator_devices(self.model), tuple(generators.values()))
        with preserved_streams(self._streams):
            self._source = DataSource(data, options.batch_size, caller, empty=self._ranks.size > 1)
        if not self._source.single or self._ranks.size > 1:
            refuse_batch_statistics(self.model, caller, options.batch_norm)
        if options.batch_norm == "batch":
            refuse_synchronised_statistics(self.model, caller)
        if options.keep_graph and not self._source.fixed:
            raise ValueError(
                f"{caller}: keep_graph: a loader yields new tensors in every pass; pass list(loader) to keep the graphs"
            )

    def _plan(self) -> None:
        """Decide which graphs are kept, and how batches are cut."""
        options = self._options
        self._chunker = Chunker(self._source, options.chunk_size, options.memory_limit, self._measure, self.caller)
        self._additive = False
        # One batch's graph is in memory during a product anyway; keeping those of many adds up, so that is opt-in.
        self._keep = options.keep_graph or False
        self._keepable: set[tuple[int, int]] | None = None
        pieces: list[Batch] = []
        if self._chunker.cuts and self._source.fixed:
            with self._isolated(), explained(self.caller):
                pieces = list(self._pieces())
        if self._source.fixed and options.memory_limit is not None and options.keep_graph is not False:
            fitting = self._chunker.fits(pieces)
            if options.keep_graph and len(fitting) < len(pieces):
                raise ValueError(
                    f"{self.caller}: keep_graph: the graphs of only {len(fitting)} of {len(pieces)} chunks fit into "
                    f"memory_limit={options.memory_limit}; raise the limit, or leave keep_graph out to keep those"
                )
            self._keepable = {(piece.number, piece.part) for piece in fitting}
            self._keep = bool(fitting)
        elif self._source.fixed and options.keep_graph is None:
            self._keep = self._source.single and options.chunk_size is None

    def _measure(self, batch: Batch) -> Usage:
        def run() -> BatchGraph:
            with BilinearConvolutions():
                graph = self.build(batch, self.chosen)
                graph.product(range(len(self.chosen)), self.layout.split(vector, self._references))
            return graph

        vector = torch.ones(self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        return measure(run)

    @abstractmethod
    def build(self, batch: Batch, chosen: Mapping[str, Tensor]) -> BatchGraph:
        """Run the model on a batch and differentiate once with respect to the chosen parameters.

        Raises:
            ValueError, TypeError, RuntimeError: the loss is not what the operator needs.
        """

    def multiply(self, indices: tuple[int, ...], layout: ParameterLayout, rows: Tensor) -> Tensor:
        """Multiply the block of the parameters at `indices` with several vectors.

        Args:
            indices: of the block's parameters among the chosen ones.
            layout: of the block.
            rows: vectors as rows (k, n), contiguous.

        Returns:
            The products as rows (k, n).

        Raises:
            ValueError: the data changed, or the product is not finite.
        """
        references = [self._references[index] for index in indices]
        shared = self._shared(indices, rows)
        with self._ranks.together(shared), self._isolated(convolutions=False), explained(self.caller):
            rows = rows.clone() if rows.is_inference() else rows  # autograd saves them
            out = torch.empty_like(rows)
            empty = True
            vectors = [layout.split(row, references) for row in rows]
            for graph, local, weight in self._graphs(indices):
                for row, parts in zip(out, vectors, strict=True):
                    (layout.assign_ if empty else layout.add_)(row, _product(graph, local, parts), weight)
                empty = False
                del graph  # before the next one is built: two would take twice the memory
            if empty:  # only other ranks have examples
                out.zero_()
        self._ranks.sum_(out)
        if not all_finite(out) and all_finite(rows):
            with self._isolated():
                culprits = (self._program.culprit(piece) for piece in self._pieces())
                infinite = "a second derivative is infinite (a square root or norm at 0?) or overflows"
                why = next(filter(None, culprits), infinite)
            raise ValueError(f"{self.caller}: the product is not finite although the loss is: {why}")
        return out

    def release(self) -> None:
        """Free the graphs kept between products."""
        self._kept.clear()

    def _isolated(self, *, convolutions: bool = True) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(preserved_streams(self._streams))
        # Also while a kept graph is in use: gradient checkpointing runs the model again in the backward.
        stack.enter_context(evaluation_mode(self._program, batch_norm=self._options.batch_norm))
        stack.enter_context(differentiable_twice(self.model, convolutions=convolutions))
        stack.enter_context(unrecorded())
        return stack

    def _graphs(self, indices: tuple[int, ...]) -> Iterator[tuple[BatchGraph, Sequence[int], float]]:
        """The graph of each batch, the positions of the block's parameters in it, and the batch's weight."""
        names = list(self.chosen)
        block = {names[index]: self.chosen[names[index]] for index in indices}
        self._drop_stale_graphs()
        for piece in self._pieces():
            weight = self._weight(piece)
            key = (piece.number, piece.part)
            if self._keep and (self._keepable is None or key in self._keepable):
                if key not in self._kept:
                    with BilinearConvolutions():
                        self._kept[key] = self.build(piece, self.chosen)
                yield self._kept[key], indices, weight
            else:
                # Only the block's parameters: the first derivative with respect to the others would be wasted.
                with BilinearConvolutions():
                    graph = self.build(piece, block)
                yield graph, range(len(indices)), weight
                del graph

    def _weight(self, piece: Batch) -> float:
        return piece.size / self._total if self._reduction == "mean" else 1.0

    def _pieces(self) -> Iterator[Batch]:
        """All batches, cut where they are too large, numbered over all ranks."""
        for _, batch in self._source.batches():
            batch = replace(batch, number=self._first_number + batch.number)
            pieces = self._chunker.pieces(batch)
            if len(pieces) > 1 and not self._additive:
                refuse_batch_statistics(self.model, self.caller, self._options.batch_norm)
                self._check_additive(batch)
                self._additive = True
            yield from pieces

    def _check_additive(self, batch: Batch) -> None:
        """Multiply with the curvature of some examples in one piece and in two: the same where the loss adds up."""
        whole, pieces = self._chunker.sample(batch)
        generator = make_generator(2, self.caller)
        layout = self.layout
        vector = draw_probes(layout.size, 1, "gaussian", generator, dtype=layout.dtype, device=layout.device)[:, 0]
        parts = layout.split(vector, self._references)
        image, difference = torch.zeros_like(vector), torch.zeros_like(vector)
        for piece in (whole, *pieces):
            weight = piece.size / whole.size if self._reduction == "mean" else 1.0
            with BilinearConvolutions():
                graph = self.comparable(piece)
            product = _product(graph, range(len(self.chosen)), parts)
            layout.add_(difference, product, weight if piece is whole else -weight)
            if piece is whole:
                layout.add_(image, product, weight)
        epsilon = max(torch.finfo(reference.dtype).eps for reference in self._references)
        if norm(difference) > min(1e4 * epsilon, 0.5) * norm(image) and norm(difference) > 30 * epsilon * (
            self._cancelled(whole) * norm(vector)
        ):
            raise ValueError(
                f"{self.caller}: chunk_size, memory_limit: the curvature of {whole.size:g} examples differs from that "
                f"of the same examples in two chunks by {norm(difference) / max(norm(image), 1e-300):.3g} of its norm: "
                f"the loss is no {self._reduction} over examples, the model lets them interact, or they do not lie "
                "along the leading dimension; give batch_size= for a mean over something else (tokens, weights), or "
                "pass the batch whole"
            )

    def comparable(self, batch: Batch) -> BatchGraph:
        """A graph whose matrix adds up over examples if that of `build` does, without random draws."""
        return self.build(batch, self.chosen)

    def _shared(self, indices: tuple[int, ...], rows: Tensor | None = None) -> dict[str, int]:
        """What must be the same on all ranks; nothing without others."""
        if self._ranks.size == 1:
            return {}
        model = list(self.model.parameters()) if rows is None else self._watched()
        found = {
            "params": bits(torch.tensor([*indices, *self.layout.offsets])),
            "model": bits(*model, *self._program.buffers()),
        }
        if rows is not None:
            found |= {"number of vectors": len(rows), "v": bits(rows)}
        return found

    def _drop_stale_graphs(self) -> None:
        """Follow the model: a graph built on other parameters or buffers is not used any more."""
        if not self._keep:
            return
        tensors = [*self.model.parameters(), *self._program.buffers()]
        # Norms besides version counters: writing through `.data` does not count a version.
        watched = [tensor for tensor in self._watched() if tensor.numel()]
        norms = torch.stack([torch.linalg.vector_norm(tensor).to("cpu", torch.float64) for tensor in watched])
        state = ([(tensor.data_ptr(), tensor._version) for tensor in tensors], norms.tolist())
        if state != self._state:
            self._kept.clear()
            self._state = state

    def _watched(self) -> list[Tensor]:
        """The parameters; of those that are frozen some entries, so that they cost nothing."""
        chosen = {id(parameter) for parameter in self.chosen.values()}
        return [
            parameter.detach() if parameter.requires_grad or id(parameter) in chosen else _some_entries(parameter)
            for parameter in self.model.parameters()
        ]

    def _check_first_batch(self) -> None:
        """Build one graph, and compare uᵀHv with vᵀHu on it: two products on one batch, once per operator.

        Some layers have a wrong double backward (torch 2.13: the fused weight_norm), and nothing else would tell.
        """
        indices = tuple(range(len(self.chosen)))
        generator = make_generator(0, self.caller)
        layout = self.layout
        with self._isolated(), explained(self.caller):
            probes = draw_probes(
                layout.size, 2, "gaussian", generator, dtype=layout.dtype, device=layout.device
            ).mT.contiguous()
            first = next(self._graphs(indices), None)
            if first is None:  # only other ranks have examples
                return
            graph, local, _ = first
            images = torch.zeros_like(probes)
            for probe, image in zip(probes, images, strict=True):
                layout.add_(image, graph.product(local, layout.split(probe, self._references)), 1.0)
        difference = abs(float(probes[0] @ images[1]) - float(probes[1] @ images[0]))
        # About ‖H‖_F, which the two inner products are compared with; the graph's precision is its parameters'.
        scale = norm(images) / math.sqrt(2.0)
        epsilon = max(torch.finfo(reference.dtype).eps for reference in self._references)
        if difference > 30 * math.sqrt(epsilon) * scale and difference > 30 * epsilon * self._first_cancelled():
            raise ValueError(
                f"{self.caller}: the second derivative is not symmetric (uᵀHv and vᵀHu differ by {difference:.3g}, "
                f"‖H‖ is about {scale:.3g}): a layer or the loss has a wrong double backward, like torch's fused "
                "weight_norm or a custom autograd.Function that detaches in its backward; use ordinary operations"
            )

    def _first_cancelled(self) -> float:
        with self._isolated():
            return self._cancelled(next(self._pieces()))

    def _cancelled(self, batch: Batch) -> float:
        """About ‖J‖_F²/N on a batch, J the derivative of the model's output.

        Where a saturated softmax cancels, ε of this is the round-off of a product, however small H itself is.
        """
        try:
            split = self._program.evaluate_split(batch, self.chosen)
        except ValueError:  # the loss has a part beside the output, which does not cancel with it
            return 0.0
        generator = make_generator(1, self.caller)
        draws = [torch.randn(o.shape, generator=generator, dtype=self.layout.dtype).to(o) for o in split.outputs]
        gradients = differentiate(split.outputs, split.leaves, draws)
        squares = sum(norm(gradient) ** 2 for gradient in gradients if gradient is not None)
        return squares / (batch.size if self._reduction == "mean" else 1)


class CurvatureOperator(ParameterOperator):
    """A symmetric curvature matrix as a linear operator; made by the functions of `kronfac.operators`.

    `op @ v` takes and returns a flat vector (n,), several as columns (n, k), or a list of tensors shaped like the
    chosen parameters; flat vectors are laid out parameter by parameter in the order of `op.names`. The operator
    follows the model: products are at the parameters that it has when they are computed. Sums, multiples and products
    of operators are operators.

    Attributes:
        names: the parameters it acts on, as in `model.named_parameters()`.
    """

    def __init__(self, engine: Engine, indices: tuple[int, ...]) -> None:
        super().__init__(engine.layout.subset(indices))
        self._engine = self._origin = engine
        self._indices = indices

    @property
    def label(self) -> str:
        """Which matrix it is."""
        return self.caller.rpartition(".")[2]

    @property
    def caller(self) -> str:
        """The function that made it."""
        return self._engine.caller

    def release(self) -> None:
        """Free the graph that is kept between products (of this operator and its blocks); the next one rebuilds it."""
        self._engine.release()

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._engine.multiply(self._indices, self._layout, rows)

    def _restricted(self, positions: Sequence[int]) -> CurvatureOperator:
        return CurvatureOperator(self._engine, tuple(self._indices[position] for position in positions))


def _product(graph: BatchGraph, indices: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor | None]:
    with BilinearConvolutions():  # gradient checkpointing runs the model again
        return graph.product(indices, parts)


def _some_entries(parameter: Tensor) -> Tensor:
    """A few thousand entries from all over a parameter."""
    flat = parameter.detach()
    if not flat.is_contiguous():
        return flat
    flat = flat.view(-1)
    return flat[:: max(1, flat.numel() // 4096)]


def generators_of(data: Any) -> Iterator[torch.Generator]:
    """Generators that a loader and its samplers draw from."""
    for owner in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
