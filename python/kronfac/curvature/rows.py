"""The rows that a gradient is the product of: V = gᵀ [a 1], kept from the training pass where that is worth more.

(G⁻¹ V A⁻¹) is (g G⁻¹)ᵀ ([a 1] A⁻¹). With few rows beside the layer's width this is several times cheaper than the two
products with V. It holds while `.grad` is exactly that product: not clipped, accumulated, reduced, unscaled or decayed.
`GradientRows.form` tests just that, so that nobody has to know what was done to a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.capture import accumulates
from kronfac.curvature.forward import OutputEdge, OutputView
from kronfac.curvature.linear import LinearAdapter

# Share of the operations of the other way below which this one is taken. It was measured to take, of the other way's
# time, 0.30 at 128 rows of a 1024 x 1024 layer (share 0.19), 0.65 at 64 rows of 256 x 256 (0.38), 1.0 at 512 rows of
# 1024 x 1024 (0.75) and 1.2 at 500 rows of 1000 x 784 (0.86): products with few rows, and the test, cost more per
# operation.
_GAIN = 0.5
_LEAST = 2e7  # operations of the other way below which the calls that this one takes cost more than they save
_SLACK = 8.0  # what is allowed for rounding, in units of eps·‖g‖·‖a‖; 0.3 is usual


class GradientRows:
    """The inputs of one call of a layer and the gradients at its outputs.

    Args:
        adapter: of the layer.
        x: the layer's input, detached.
        view: of the output in the tensor whose gradient the hook sees.
        output_nr: of the graph's node.

    Attributes:
        adapter: of the layer.
        x: inputs without the bias's one (rows, in).
        g: gradients (rows, out); None before the backward.
    """

    def __init__(self, adapter: LayerAdapter, x: Tensor, view: OutputView, output_nr: int) -> None:
        self.adapter = adapter
        self.x = x.reshape(-1, x.shape[-1])
        self.g: Tensor | None = None
        self._input, self._version = x, x._version
        self._view, self._output_nr = view, output_nr
        self._leaf: Node = get_gradient_edge(adapter.weight).node
        self._unusable = False

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Pre-hook of the node that computed the output, called by autograd."""
        gradient = gradients[self._output_nr]
        # Only a backward into .grad counts: that of the drawn targets and those for inputs pass here too.
        if gradient is None or self._unusable or not accumulates(self._leaf):
            return
        if self.g is not None:  # a second backward: .grad is a sum of products
            self.drop()
            return
        g = self._view.gradient(gradient)
        self.g = g.reshape(-1, g.shape[-1])

    def drop(self) -> None:
        """Give the rows up."""
        self._unusable, self.g = True, None

    def form(self) -> bool:
        """Whether the layer's `.grad` is the product of these rows, up to the rounding of the product itself.

        Both are multiplied by a vector of random signs, which two different matrices survive with equal results only
        by a conspiracy (Freivalds, 1977). Reads the result, that is, waits for it.
        """
        x, g, parameters = self.x, self.g, self.adapter.parameters()
        if self._unusable or g is None or self._input._version != self._version or len(g) != len(x):
            return False
        grads = [parameter.grad for parameter in parameters]
        if any(grad is None or grad.dtype != x.dtype or grad.device != x.device for grad in grads):
            return False
        weight = grads[0]
        assert weight is not None
        signs = _signs(x.shape[1] + 1, x.dtype)
        product, expected = weight.mv(signs[:-1]), x.mv(signs[:-1])
        if len(grads) > 1:
            assert grads[1] is not None
            product.add_(grads[1] * signs[-1])
            expected.add_(signs[-1])
        norms = [torch.linalg.vector_norm(some) for some in (product.sub_(g.mT.mv(expected)), g, x)]
        off, length, width = torch.stack(norms).tolist()
        bound = _SLACK * torch.finfo(x.dtype).eps * length * math.hypot(width, math.sqrt(len(x)))
        # False for NaN; an infinite bound would let everything pass.
        return bool(off <= bound < math.inf)


class RowKeeper:
    """Keeps the rows of the layers for which it pays, from a forward to the step.

    Args:
        adapters: of the covered layers, by name.

    Attributes:
        enabled: whether the optimizer has any use for rows.
        limits: up to how many rows, by name of the layers that may be worth it.
    """

    def __init__(self, adapters: Mapping[str, LayerAdapter]) -> None:
        self.enabled = False
        self.limits = {name: limit for name, adapter in adapters.items() if (limit := _limit(adapter)) > 0}
        self._kept: dict[str, GradientRows] = {}

    def keep(self, name: str, adapter: LayerAdapter, x: Any, output: Any) -> None:
        """A layer has run under grad mode; its rows are kept when they are few."""
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad):
            return
        before = self._kept.get(name)
        if before is not None:
            before.drop()  # used twice since the last step: .grad may be the sum of several products
            return
        if not adapter.parameters():
            return
        weight = adapter.weight
        if (
            math.prod(x.shape[:-1]) > self.limits[name]
            or not (x.is_cpu and weight.is_cpu)  # elsewhere the test would make the host wait for the device
            or not (x.dtype == output.dtype == weight.dtype == adapter.factor_dtype)
            or x.is_nested
        ):
            return
        edge = OutputEdge.of(output)
        rows = GradientRows(adapter, x.detach(), edge.view, edge.edge.output_nr)
        self._kept[name] = rows
        edge.edge.node.register_prehook(rows)

    def take(self) -> dict[str, GradientRows]:
        """Hand over the rows kept since the last call."""
        kept, self._kept = self._kept, {}
        return kept


def _limit(adapter: LayerAdapter) -> int:
    if type(adapter) is not LinearAdapter:
        return 0
    inputs, outputs = adapter.factor_sizes
    # Multiplications with the input side's inverses per input; a doubly factored one has two small ones.
    side = inputs if adapter.input_shape is None else sum(adapter.input_shape)
    two_sided = inputs * outputs * (side + outputs)
    if 2 * two_sided < _LEAST:
        return 0
    per_row = inputs * side + outputs * outputs + inputs * outputs
    return int(_GAIN * two_sided / per_row)


_known_signs: dict[torch.dtype, Tensor] = {}


def _signs(count: int, dtype: torch.dtype) -> Tensor:
    """Signs from a stream of their own: the same at every call, and the global one is left alone."""
    known = _known_signs.get(dtype)
    if known is None or len(known) < count:
        bits = torch.randint(2, (max(count, 1024),), generator=torch.Generator().manual_seed(0x5163), device="cpu")
        known = _known_signs[dtype] = (2 * bits - 1).to(dtype)
    return known[:count]
