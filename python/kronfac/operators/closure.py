"""The curvature of a loss that a closure evaluates on sets of examples: what Newton-type optimizers multiply with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronfac.curvature import Likelihood, resolve_likelihood
from kronfac.linalg.finite import all_finite
from kronfac.operators.algebra import ParameterOperator
from kronfac.operators.base import BatchGraph
from kronfac.operators.closure_program import Closure, ClosureProgram, ClosureValue, check_indices
from kronfac.operators.ggn import pushforward_graph
from kronfac.operators.options import check_counts
from kronfac.operators.program import differentiate

CURVATURES = ("hessian", "ggn", "fisher")
"""What a `ClosureOperator` can multiply with."""


class ClosureOperator(ParameterOperator):
    """The Hessian, the generalised Gauss-Newton matrix or the Fisher matrix of a closure's loss over some examples.

    "hessian" differentiates the loss twice. "ggn" is Jᵀ H J with J the derivative of the outputs with respect to the
    parameters and H the Hessian of the loss with respect to the outputs; "fisher" is (1/M) Σ Jᵀ F J with F the Fisher
    matrix of the likelihood in the outputs of an example, an exact expectation, and M the number of its terms
    (Martens, arXiv:1412.1193). Both need a closure that returns (loss, outputs). Random streams and buffers are as
    before after every product, and all products are from the same random numbers.

    Args:
        closure: called with the indices of examples (int64 on the CPU), or with None for all; returns their mean loss,
            built by autograd, or (loss, outputs).
        parameters: the optimized parameters; those that are frozen or unused have zero rows and columns.
        indices: the examples; None for all.
        curvature: "hessian", "ggn" or "fisher".
        likelihood: of the outputs, as in `kronfac.KFAC`, for "fisher" alone.
        examples: how many there are, needed where all of them are to be cut into chunks.
        chunk_size: the most examples handed to the closure at once, None for no limit. Means are weighted by counts.
        keep_graph: keep the differentiated graph between products, while the parameters stay as they are. Default: for
            examples that are not cut.
        names: of the parameters; None numbers them.

    Attributes:
        names: of the parameters.
        propagations: example-propagations spent: 2 for every example and vector (a Hessian-vector product counts as
            two passes).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown curvature or likelihood, an option out of range.
    """

    def __init__(
        self,
        closure: Closure | ClosureProgram,
        parameters: Iterable[Tensor] = (),
        indices: Tensor | None = None,
        *,
        curvature: str = "hessian",
        likelihood: str | Likelihood | None = None,
        examples: int | None = None,
        chunk_size: int | None = None,
        keep_graph: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        caller = closure.caller if isinstance(closure, ClosureProgram) else "kronfac.operators.ClosureOperator"
        if curvature not in CURVATURES:
            raise ValueError(
                f"{caller}: curvature: expected one of {', '.join(map(repr, CURVATURES))}, got {curvature!r}"
            )
        if (likelihood is None) == (curvature == "fisher"):
            wanted = (
                'a likelihood for curvature="fisher"' if likelihood is None else f'None for curvature="{curvature}"'
            )
            raise ValueError(f"{caller}: likelihood: expected {wanted}, got {likelihood!r}")
        if not (keep_graph is None or isinstance(keep_graph, bool)):
            raise TypeError(f"{caller}: keep_graph: expected True, False or None, got {keep_graph!r}")
        if not isinstance(closure, ClosureProgram):
            check_counts(caller, examples=examples, chunk_size=chunk_size)
            if chunk_size is not None and examples is None and indices is None:
                raise ValueError(
                    f"{caller}: chunk_size: expected None without examples= or indices=, got {chunk_size}; how many "
                    "examples there are to cut is not known"
                )
            check_indices(indices, examples, caller)
            closure = ClosureProgram(
                closure, parameters, examples=examples, chunk_size=chunk_size, names=names, caller=caller
            )
        super().__init__(closure.layout)
        self._program, self._indices, self._curvature = closure, indices, curvature
        self._likelihood = None if likelihood is None else resolve_likelihood(likelihood)
        self._pieces = closure.pieces(indices)
        self._keep = len(self._pieces) == 1 if keep_graph is None else keep_graph
        self._kept: dict[int, BatchGraph] = {}
        self._state: Any = None
        self.propagations = 0

    @property
    def label(self) -> str:
        """Which matrix it is."""
        return f"{self._curvature} of a closure"

    @property
    def caller(self) -> str:
        """What made it."""
        return self._program.caller

    def release(self) -> None:
        """Free the graphs kept between products; the next product evaluates the closure again."""
        self._kept.clear()

    def _multiply(self, rows: Tensor) -> Tensor:
        program, layout = self._program, self._layout
        self._drop_stale_graphs()
        out = torch.zeros_like(rows)
        with program.isolated():
            vectors = [layout.split(row, program.references) for row in rows]
            for number, (piece, weight) in enumerate(self._pieces):
                graph = self._kept.get(number)
                if graph is None:
                    graph = self._build(piece)
                    if self._keep:
                        self._kept[number] = graph
                everything = range(len(program.parameters))
                with program.explained():
                    for row, parts in zip(out, vectors, strict=True):
                        layout.add_(row, graph.product(everything, parts), weight)
                del graph  # before the next one is built: two would take twice the memory
        self.propagations += 2 * program.count(self._indices) * len(rows)
        if not all_finite(out) and all_finite(rows):
            raise ValueError(
                f"{self.caller}: closure: a product with the {self._curvature} is not finite although the loss is: a "
                "second derivative is infinite (a square root or norm at 0?) or overflows"
            )
        return out

    def _build(self, piece: Tensor | None) -> BatchGraph:
        value = self._program.evaluate(piece)
        with self._program.explained():
            return self._graph(value)

    def _graph(self, value: ClosureValue) -> BatchGraph:
        program = self._program
        one = torch.ones_like(value.loss)
        if self._curvature == "hessian":
            return _HessianGraph(program, program.differentiate([value.loss], [one], create_graph=True))
        outputs = self._outputs(value)
        live = [parameter for parameter in program.parameters if parameter.requires_grad]
        likelihood = self._likelihood
        if likelihood is not None:
            fixed = outputs.detach()
            likelihood.check(fixed)
            scale = 1.0 / likelihood.terms(fixed, None)

            def curve(pushed: list[Tensor]) -> list[Tensor]:
                with torch.no_grad():
                    return [likelihood.fisher_product(fixed, pushed[0], None).to(fixed.dtype) * scale]
        else:
            gradients = differentiate([value.loss], [outputs], [one], create_graph=True)

            def curve(pushed: list[Tensor]) -> list[Tensor]:
                product = differentiate(gradients, [outputs], pushed)[0]
                return [torch.zeros_like(outputs) if product is None else product]

        return _Spread(program, pushforward_graph([outputs], live, curve))

    def _outputs(self, value: ClosureValue) -> Tensor:
        where = f"{self.caller}: closure"
        outputs = value.outputs
        if outputs is None:
            raise ValueError(
                f'{where}: curvature="{self._curvature}" needs the outputs that the loss is computed from; return the '
                "pair (loss, outputs)"
            )
        if not (outputs.dtype.is_floating_point and outputs.requires_grad):
            raise ValueError(
                f"{where}: outputs: expected a floating-point tensor with its graph, got {outputs.dtype}, "
                f"{'with' if outputs.requires_grad else 'without'} one; return what the loss is computed from"
            )
        edge = torch.autograd.graph.get_gradient_edge(outputs)
        nodes, reached = _nodes_before(value.loss, edge.node)
        if not reached:
            raise ValueError(
                f"{where}: the loss was not computed from the outputs that came with it; return the very tensor that "
                "the loss function was called with"
            )
        own = {id(parameter) for parameter in self._program.parameters}
        if any(id(getattr(node, "variable", None)) in own for node in nodes):
            raise ValueError(
                f"{where}: the loss depends on parameters other than through the outputs (a regulariser?), which "
                f'curvature="{self._curvature}" does not see; take that term out, or use curvature="hessian"'
            )
        return outputs

    def _drop_stale_graphs(self) -> None:
        """A graph built on other values of the parameters is not used any more."""
        if not self._keep:
            return
        tensors = self._program.parameters
        # Norms besides version counters: writing through `.data` does not count a version.
        norms = torch.stack([torch.linalg.vector_norm(t.detach()).to("cpu", torch.float64) for t in tensors])
        state = ([(t.data_ptr(), t._version, t.requires_grad) for t in tensors], norms.tolist())
        if state != self._state:
            self._kept.clear()
            self._state = state


@dataclass(frozen=True, eq=False)
class _HessianGraph:
    program: ClosureProgram
    gradients: list[Tensor | None]

    def product(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor | None]:
        return self.program.differentiate(self.gradients, vectors)


@dataclass(frozen=True, eq=False)
class _Spread:
    """The graph of the parameters that are not frozen, for vectors over all."""

    program: ClosureProgram
    graph: BatchGraph

    def product(self, indices: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor | None]:
        live = [index for index in indices if self.program.parameters[index].requires_grad]
        found = self.graph.product(range(len(live)), [vectors[index] for index in live])
        result: list[Tensor | None] = [None] * len(indices)
        for index, part in zip(live, found, strict=True):
            result[index] = part
        return result


def _nodes_before(loss: Tensor, stop: Any) -> tuple[set[Any], bool]:
    """The nodes of a graph without those behind `stop`, and whether it was met."""
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    reached = False
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node is stop or node == stop:
            reached = True
            continue
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return seen, reached
