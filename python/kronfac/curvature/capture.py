"""Taking gradients at layer outputs from the user's own backward."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from kronfac.curvature.clock import Clock, timed
from kronfac.curvature.forward import Call, Forward, OutputEdge
from kronfac.curvature.precision import without_autocast

if TYPE_CHECKING:
    from kronfac.curvature.recorder import Recorder


class Capture:
    """Pre-hook of the node that computed a layer's output, for fisher="empirical".

    Only a backward that accumulates into the layer's parameter counts: gradients for an adversarial example or a
    penalty pass through the same node.

    Args:
        recorder: whom to tell, known weakly.
        forward: the recorded forward; the graph keeps it alive through this hook until a backward reaches it, so
            that a forward without a backward vanishes with its graph.
        name: of the layer.
        call: of the layer.
        edge: of the layer's output.
    """

    def __init__(self, recorder: Recorder, forward: Forward, name: str, call: Call, edge: OutputEdge) -> None:
        self._recorder = weakref.ref(recorder)
        self._forward, self._name, self._call = forward, name, call
        # Not the edge: its node owns this hook.
        self._output_nr, self._view = edge.edge.output_nr, edge.view
        self._leaf: Node = get_gradient_edge(call.adapter.parameters()[0]).node
        self._fired = False

    @property
    def clock(self) -> Clock | None:
        """That of the recorder."""
        recorder = self._recorder()
        return None if recorder is None else recorder.clock

    @timed("statistics")
    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Called by autograd before the node runs."""
        recorder, forward = self._recorder(), self._forward
        gradient = gradients[self._output_nr]
        if recorder is None or recorder.removed or gradient is None or not forward.complete or forward.collected:
            return
        if not accumulates(self._leaf):
            return
        recorder.reach(forward, self._fired)
        if self._fired:
            return
        self._fired = True
        with torch.no_grad(), without_autocast(gradient.device):
            forward.add_gradient(self._name, self._call, self._view.gradient(gradient))


def accumulates(leaf: Node) -> bool:
    """Whether the backward that runs now adds to the ``.grad`` of a parameter."""
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:  # torch.autograd.grad, which returns gradients instead
        return False
