"""What is remembered of one forward while it is recorded."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.doubly_factored import doubly_factored_statistics
from kronfac.curvature.extra import ExtraStatistic
from kronfac.curvature.statistics import LayerStatistics, no_factors

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
        x: the input, kept until the mask is known, or for as long as the call where the adapter or a further statistic
            needs it.
        version: of the input when it was remembered.
        mask: the positions that count, None for all.
        resolved: whether the input statistics were taken.
        reduced: whether the layer's statistics are one row per example.
        flipped: whether the examples are the second dimension of what the layer sees.
        swapped: whether they are and the layer's own statistics do not mind: every row counts as an example.
        extra: further statistics to take of it, by name.
        bare: whether these are all that is taken of it, without A and G.
        following: the covered call right after it in the same forward.
        repeated: whether the layer was called more than once in the forward.
        joined: whether the call before wants to see this one's input and gradients.
        gradient: the newest at the call's output, where it is `joined`; whoever has used it takes it away.
        crossed: whether its input was multiplied with that of the call after it.
        kept: what the adapter found in the graph of the output; see `LayerAdapter.kept_by`.
    """

    adapter: LayerAdapter
    shape: torch.Size
    x: Tensor | None = None
    version: int = 0
    mask: Tensor | None = None
    resolved: bool = False
    reduced: bool = False
    flipped: bool = False
    swapped: bool = False
    extra: Mapping[str, ExtraStatistic] = field(default_factory=dict)
    bare: bool = False
    following: Call | None = field(default=None, repr=False)
    repeated: bool = False
    joined: bool = False
    gradient: Tensor | None = None
    crossed: bool = False
    kept: Any = None

    @property
    def keeps_input(self) -> bool:
        """Whether the input is needed together with the gradient."""
        return (
            self.adapter.keeps_input or self.joined or any(statistic.keeps_input for statistic in self.extra.values())
        )

    def merges(self, examples: int) -> bool:
        """Whether the gradient at the call's output may be a sum over the examples of a batch of that many.

        So it is where a layer is applied once for the whole batch, as a position embedding of ids (1, T) or (T,) is.
        Rows of several examples that were flattened into one dimension look the same from here.
        """
        first, *others = self.shape
        second = len(others) > 1 and first > 1 and others[0] == examples
        return examples > 1 and first != examples and not second

    def surely_merges(self, examples: int) -> bool:
        """Whether there is hardly another reading of the output's shape; rows that were flattened are one."""
        first, *others = self.shape
        if not self.merges(examples):
            return False
        if len(others) > 1:
            return first == 1 and others[0] != examples
        return self.adapter.block == "diagonal_input" and first % examples != 0

    @property
    def inputs(self) -> Tensor:
        """What the layer saw, examples first; only of a call that `keeps_input`."""
        assert self.x is not None
        return self.x.transpose(0, 1) if self.flipped else self.x

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Add the call's input statistics, the user's mask being known."""
        x = x.transpose(0, 1) if self.flipped else x
        self.mask, self.resolved = self.adapter.restrict(mask, x), True
        if self.bare:
            return no_factors(self.adapter)[0]
        if self.adapter.input_shape is not None:
            return doubly_factored_statistics(out, self.adapter, x, self.mask)
        return self.adapter.input_statistics(out, x, self.mask)

    def output_statistics(self, out: Tensor | None, g: Tensor, scale: float) -> Tensor:
        """Add the output statistics of what `layer_gradient` made."""
        if self.bare:
            return no_factors(self.adapter)[1]
        return self.adapter.output_statistics(out, g, self.mask, scale)

    def layer_gradient(self, g: Tensor) -> Tensor:
        """What the statistics are taken of, examples first, given the gradient at the call's output."""
        if self.adapter.keeps_input:
            assert self.x is not None
            if self.kept is None:
                g = self.adapter.layer_gradient(g, self.x)
            else:
                g = self.adapter.layer_gradient_with(g, self.x, self.kept)
        return g.transpose(0, 1) if self.flipped else g


@dataclass
class Forward:
    """One forward under recording. It never refers to the graph: for fisher="empirical" the graph refers to it.

    Attributes:
        update_only: the forward is for statistics alone.
        calls: of each covered layer.
        A_sums: input statistics by layer.
        G_sums: output statistics by layer, of the layers that a gradient has reached.
        extra_sums: further statistics by layer and name, likewise.
        watched: the further statistics of each layer that are wanted, by name.
        bare: layers of which A and G are not wanted.
        newest: the last covered call so far.
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
    extra_sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    watched: Mapping[str, Mapping[str, ExtraStatistic]] = field(default_factory=dict)
    bare: Collection[str] = ()
    newest: Call | None = None
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

    @property
    def merges(self) -> bool:
        """Whether a layer may have been applied once for all examples; known once `resolve` was called."""
        return any(call.merges(self.examples) for calls in self.calls.values() for call in calls)

    @property
    def surely_merged(self) -> list[str]:
        """Names of the layers that were, as far as shapes can say."""
        return [name for name, calls in self.calls.items() if any(call.surely_merges(self.examples) for call in calls)]

    def enter(self, name: str, adapter: LayerAdapter, x: Tensor, shape: torch.Size, *, defer: bool) -> Call:
        """Note a call of a layer; its input statistics are taken now, or later when the mask is not known yet.

        Args:
            name: of the layer.
            adapter: of the layer.
            x: the input.
            shape: of the output.
            defer: keep the input until `resolve`, which also happens where the adapter keeps it.
        """
        call = Call(adapter, shape, reduced=adapter.reduces, bare=name in self.bare)
        if self.watched.get(name):
            call.extra = {key: some for key, some in self.watched[name].items() if some.available}
        before, self.newest = self.newest, call
        if before is not None:
            before.following = call
            call.joined = any(statistic.joins for statistic in before.extra.values())
        for other in self.calls.get(name, ()):
            other.repeated = call.repeated = True
        x = x.detach()
        if defer or call.keeps_input:
            call.x, call.version = x, x._version
        if not (defer or adapter.keeps_input):
            self.A_sums[name] = call.input_statistics(self.A_sums.get(name), x, None)
        self.calls.setdefault(name, []).append(call)
        return call

    def resolve(self) -> None:
        """Take the input statistics that waited for the mask.

        Raises:
            RuntimeError: an input was modified in place meanwhile, or sharing="reduce" cannot tell examples from
                positions.
        """
        for name, calls in self.calls.items():
            for call in calls:
                self._find_examples(name, call)
                if call.x is None:
                    continue
                if call.x._version != call.version:
                    raise RuntimeError(
                        f"kronfac: the input of layer {name!r} was modified in place after the layer had used it, and "
                        "with mask=, and for a layer whose gradient depends on it, it is needed until the end of the "
                        "forward; make that operation out-of-place (inplace=False)"
                    )
                if not call.resolved:
                    self.A_sums[name] = call.input_statistics(self.A_sums.get(name), call.x, self.mask)
                if not call.keeps_input:
                    call.x = None

    def _find_examples(self, name: str, call: Call) -> None:
        """Notice layers that see (T, N, ...) although whole examples are what counts."""
        shape = call.shape
        second = len(shape) > 2 and shape[0] != self.examples and shape[1] == self.examples
        if not (call.adapter.leading_positions and second):
            return
        if not call.reduced:
            call.swapped = True
            return
        if call.adapter.block != "dense":
            raise RuntimeError(
                f"kronfac: layer {name!r}: sharing='reduce' expects the examples in the first dimension, got "
                f"{tuple(shape)} with {self.examples} examples; use batch_first=True, or sharing='expand' for this "
                "layer's parameters"
            )
        call.shape, call.flipped = torch.Size((shape[1], shape[0], *shape[2:])), True

    def add_gradient(self, name: str, call: Call, g: Tensor, scale: float = 1.0) -> None:
        """Take the output statistics of a gradient at a layer's output."""
        g = call.layer_gradient(g)
        call.gradient = g if call.joined else None
        self.G_sums[name] = call.output_statistics(self.G_sums.get(name), g, scale)
        if call.extra:
            sums = self.extra_sums.setdefault(name, {})
            for key, statistic in call.extra.items():
                sums[key] = statistic.add(sums.get(key), call, g, scale)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Sums of the layers that a gradient has reached, in the order of their calls; the others count as unused."""
        return {
            name: LayerStatistics(
                self.A_sums[name],
                self.G_sums[name],
                sum(call.adapter.positions(call.shape, call.mask) for call in self.calls[name]),
                self.calls[name][0].reduced,
                self.extra_sums.get(name, {}),
            )
            for name in self.calls
            if name in self.G_sums
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
