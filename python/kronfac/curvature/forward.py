"""What is remembered of one forward while it is recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.statistics import LayerStatistics

_REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class OutputView:
    """How a layer's output lies in the tensor whose gradient is at hand.

    Attributes:
        shape: of the output.
        layout: stride and storage offset in that tensor, None when it is the output itself.
    """

    shape: torch.Size
    layout: tuple[tuple[int, ...], int] | None

    def gradient(self, raw: Tensor) -> Tensor:
        """The gradient at the output, detached."""
        raw = raw.detach()
        if self.layout is None:
            return raw
        stride, offset = self.layout
        return raw.contiguous().as_strided(self.shape, stride, offset)


class OutputEdge(NamedTuple):
    """Where in the graph the gradient at a layer's output is to be had, whatever happens to the output tensor later.

    The edge of the node that computed the output is kept, never the tensor: after an in-place activation the tensor
    stands for the activation. Where the output is a view (a Linear on tokens returns a view of a matrix), an
    in-place activation even takes the view's node out of the graph, so the edge is that of its base.

    Attributes:
        edge: of the output or of its base.
        view: the output in it.
    """

    edge: GradientEdge
    view: OutputView

    @classmethod
    def of(cls, output: Tensor) -> OutputEdge:
        """The edge of a layer's output, right after the layer's forward."""
        base = output._base if output._is_view() else None
        if base is not None and base.grad_fn is not None and base.is_contiguous() and base.numel() == output.numel():
            offset = int(output.storage_offset() - base.storage_offset())
            return cls(get_gradient_edge(base), OutputView(output.shape, (output.stride(), offset)))
        return cls(get_gradient_edge(output), OutputView(output.shape, None))


@dataclass
class Call:
    """One call of a covered layer.

    Attributes:
        adapter: of the layer.
        shape: of the output.
        x: the input, kept only until the mask is known.
        version: of the input when it was remembered.
    """

    adapter: LayerAdapter
    shape: torch.Size
    x: Tensor | None = None
    version: int = 0


@dataclass
class Forward:
    """One forward under recording. It never refers to the graph: for fisher="empirical" the graph refers to it.

    Attributes:
        update_only: the forward is for statistics alone.
        calls: of each covered layer.
        A_sums: input statistics by layer.
        G_sums: output statistics by layer, of the layers that a gradient has reached.
        ungraphed: layers that ran without a graph.
        mask: terms that count, None for all.
        terms: M, once the forward is complete.
        examples: N, once the forward is complete.
        complete: whether the root's forward has returned.
        collected: whether the sums were handed over or dropped; a later backward then adds nothing.
        outer: the exception that was being handled when the forward began.
    """

    update_only: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)
    A_sums: dict[str, Tensor] = field(default_factory=dict)
    G_sums: dict[str, Tensor] = field(default_factory=dict)
    ungraphed: list[str] = field(default_factory=list)
    mask: Tensor | None = None
    terms: float = 0
    examples: int = 0
    complete: bool = False
    collected: bool = False
    outer: BaseException | None = field(default_factory=lambda: sys.exc_info()[1])

    @property
    def failed(self) -> bool:
        """Whether an exception of the forward itself is on its way out."""
        exception = sys.exc_info()[1]
        return exception is not None and exception is not self.outer

    def enter(self, name: str, adapter: LayerAdapter, x: Tensor, shape: torch.Size, *, defer: bool) -> None:
        """Note a call of a layer; its input statistics are taken now, or later when the mask is not known yet.

        Args:
            name: of the layer.
            adapter: of the layer.
            x: the input.
            shape: of the output.
            defer: keep the input until `resolve`.
        """
        call = Call(adapter, shape)
        x = x.detach()
        if defer:
            call.x, call.version = x, x._version
        else:
            self.A_sums[name] = adapter.input_statistics(self.A_sums.get(name), x, None)
        self.calls.setdefault(name, []).append(call)

    def resolve(self) -> None:
        """Take the input statistics that waited for the mask.

        Raises:
            RuntimeError: an input was modified in place meanwhile.
        """
        for name, calls in self.calls.items():
            for call in calls:
                if call.x is None:
                    continue
                if call.x._version != call.version:
                    raise RuntimeError(
                        f"kronfac: the input of layer {name!r} was modified in place after the layer had used it, and "
                        "with mask= it is needed until the end of the forward; make that operation out-of-place "
                        "(inplace=False)"
                    )
                self.A_sums[name] = call.adapter.input_statistics(self.A_sums.get(name), call.x, self.mask)
                call.x = None

    def add_gradient(self, name: str, adapter: LayerAdapter, g: Tensor, scale: float = 1.0) -> None:
        """Take the output statistics of a gradient at a layer's output."""
        self.G_sums[name] = adapter.output_statistics(self.G_sums.get(name), g, self.mask, scale)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Sums of the layers that a gradient has reached. The others did not influence the output: as if unused."""
        return {
            name: LayerStatistics(
                self.A_sums[name], g, sum(call.adapter.positions(call.shape, self.mask) for call in self.calls[name])
            )
            for name, g in self.G_sums.items()
        }


def refuse_reentrant(names: Sequence[str], outputs: Iterable[Tensor]) -> None:
    """Refuse reentrant checkpointing, which is one way in which a layer can have run without a graph.

    Args:
        names: layers that ran without a graph.
        outputs: of the model.

    Raises:
        RuntimeError: the graph of the outputs holds a reentrant checkpoint.
    """
    stack: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: set[Node] = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == _REENTRANT:
            raise RuntimeError(
                f"kronfac: layers {', '.join(map(repr, names[:5]))} ran under reentrant checkpointing, which leaves no "
                "graph to take curvature statistics from; pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
