"""How much memory K-FAC holds, layer by layer: counted in an optimizer, or predicted before there is one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from kronfac.optim import options
from kronfac.optim.background import Background
from kronfac.optim.chains import form_chains, link_shapes
from kronfac.optim.layers import Layer, assign
from kronfac.optim.structures import STRUCTURES, structure_for


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that are held for one layer between steps.

    Attributes:
        factors: running averages.
        inverses: what gradients are preconditioned with: inverses, or eigenvectors and eigenvalues.
        pending: inverses that wait to be taken into use (`max_staleness`).
        momentum: momentum buffers.
    """

    factors: int
    inverses: int
    pending: int
    momentum: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.factors + self.inverses + self.pending + self.momentum


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that K-FAC holds beside the model, its gradients and its activations.

    Attributes:
        layers: of the covered layers, by name.
        uncovered: momentum of the parameters that train as SGD.
        temporary: most that a step needs for itself on top; 0 where it was not asked for.
    """

    layers: Mapping[str, LayerMemory] = field(default_factory=dict)
    uncovered: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        """What is held between steps."""
        return self.uncovered + sum(layer.total for layer in self.layers.values())

    @property
    def peak(self) -> int:
        """What is held while a step is taken."""
        return self.total + self.temporary

    def __str__(self) -> str:
        """A table in MiB, one line for each layer."""
        rows = [(name, layer.factors, layer.inverses, layer.pending, layer.momentum) for name, layer in self._named()]
        width = max([len("uncovered"), *(len(row[0]) for row in rows)])
        head = f"{'MiB':{width}} {'factors':>9} {'inverses':>9} {'pending':>9} {'momentum':>9}"
        lines = [f"{name:{width}} " + " ".join(f"{part / 2**20:9.2f}" for part in parts) for name, *parts in rows]
        end = [f"{'uncovered':{width}} {'':9} {'':9} {'':9} {self.uncovered / 2**20:9.2f}"]
        end.append(f"held {self.total / 2**20:.2f}, in a step {self.temporary / 2**20:.2f} more")
        return "\n".join([head, *lines, *end])

    def _named(self) -> Iterable[tuple[str, LayerMemory]]:
        return self.layers.items()


def held(
    layers: Sequence[Layer], state: Mapping[Tensor, Mapping[str, Any]], background: Background | None
) -> MemoryReport:
    """Count what an optimizer holds at present.

    Args:
        layers: the covered layers.
        state: of the optimizer, by parameter.
        background: that makes inverses, if any; what it has not finished is not counted.
    """
    waiting = {} if background is None else background.held()
    result: dict[str, LayerMemory] = {}
    shared = 0
    for layer in layers:
        fractions = {id(p): numel / p.numel() for p, numel in zip(layer.parameters, _numels(layer), strict=True)}
        momentum = sum(
            round(_bytes(state[p].values()) * fractions[id(p)]) for p in layer.parameters if state.get(p) is not None
        )
        shared += momentum
        result[layer.name] = LayerMemory(
            factors=0 if layer.factors is None else _bytes([*layer.factors[:2], *layer.factors.extra.values()]),
            inverses=_bytes((layer.factorisation or {}).values()),
            pending=sum(_bytes(value.values()) for value in waiting.get(layer.name, ())),
            momentum=momentum,
        )
    return MemoryReport(result, sum(_bytes(entry.values()) for entry in state.values()) - shared)


def predict_memory(
    model: nn.Module,
    *,
    params: ParamsT | None = None,
    structure: str = "kfac",
    solve: str = "inverse",
    momentum: float = 0.9,
    inverse_every: int = 10,
    max_staleness: int = 0,
) -> MemoryReport:
    """Predict what `kronfac.KFAC` with these options will hold, without making it or allocating anything.

    The model may lie on the "meta" device. What is held between steps is exact once every layer has statistics and
    inverses. `temporary` is an upper estimate for a step that takes statistics and inverts: fresh statistics beside
    the averages, new inverses beside the old, gradient matrices with their bias, preconditioned gradients, and the
    solver's own workspace. Activations, parameters and gradients are not counted.

    Args:
        model: to be trained.
        params: as for KFAC; groups may set momentum.
        structure: as for KFAC.
        solve: as for KFAC.
        momentum: as for KFAC.
        inverse_every: as for KFAC, a number; it matters for `max_staleness` only.
        max_staleness: as for KFAC.

    Returns:
        The report; ``print`` shows it as a table.

    Raises:
        TypeError, ValueError: an option of the wrong type or outside its range, or what KFAC would refuse about
            `params`.
    """
    where = "predict_memory"
    structures = structure_for(
        options.choice(f"{where}: structure", structure, STRUCTURES),
        options.choice(f"{where}: solve", solve, ("inverse", "eigen")),
    )
    staleness = options.integer(f"{where}: max_staleness", max_staleness, low=0)
    at_once = math.ceil(staleness / options.integer(f"{where}: inverse_every", inverse_every))
    groups = _groups(where, model.parameters() if params is None else params, momentum)
    buffered = {id(p): group["momentum"] > 0 for group in groups for p in group["params"] if p.requires_grad}
    coverage = assign(model, groups, structures)
    if structures.chains:
        form_chains(coverage.layers)
    by_name = {layer.name: layer for layer in coverage.layers}
    result: dict[str, LayerMemory] = {}
    workspaces = [0]
    step = 0
    for layer in coverage.layers:
        item = torch.finfo(layer.dtype).bits // 8
        A, G = layer.factor_shapes
        extra = [statistic.shape for statistic in layer.statistics.values()]
        factors = item * sum(math.prod(shape) for shape in (A, G, *extra))
        shapes = [*structures.shapes(layer.adapter).values(), *link_shapes(layer, by_name).values()]
        inverses = item * sum(math.prod(shape) for shape in shapes)
        numels = _numels(layer)
        result[layer.name] = LayerMemory(
            factors,
            inverses,
            at_once * inverses,
            sum(
                numel * p.element_size()
                for p, numel in zip(layer.parameters, numels, strict=True)
                if buffered.get(id(p), False)
            ),
        )
        matrix = math.prod(layer.adapter.matrix_shape) * max(4, layer.parameters[0].element_size())
        # Fresh statistics, and the factors that a pending request keeps alive.
        step += factors * (1 + at_once) + matrix * (2 if layer.adapter.has_bias else 1)
        step += 0 if staleness else inverses
        order = max((size for shape in shapes for size in shape[-1:]), default=0)
        # syevd works on a copy and wants 2 n² more; a product in two steps wants its middle.
        workspaces.append(item * 3 * order * order if solve == "eigen" else matrix)
    momenta = sum(p.numel() * p.element_size() for g in groups for p in g["params"] if buffered.get(id(p), False))
    uncovered = momenta - sum(layer.momentum for layer in result.values())
    return MemoryReport(result, uncovered, step + max(workspaces) if result else 0)


def _groups(where: str, params: Iterable[Any], momentum: float) -> list[dict[str, Any]]:
    """Param groups from whatever torch accepts as `params`."""
    chosen = list(params)
    if chosen and not isinstance(chosen[0], dict):
        chosen = [{"params": chosen}]
    groups = []
    for index, group in enumerate(chosen):
        own = group["params"]
        tensors = [own] if isinstance(own, Tensor) else list(own)
        groups.append(
            {
                "params": [item[1] if isinstance(item, tuple) else item for item in tensors],
                "momentum": options.number(
                    f"{where}: params[{index}]: momentum", group.get("momentum", momentum), high=1.0
                ),
            }
        )
    return groups


def _numels(layer: Layer) -> list[int]:
    """Elements of each parameter that are the layer's own: all, or its slice."""
    slices = layer.adapter.slices
    if slices is None:
        return [p.numel() for p in layer.parameters]
    return [p[place].numel() for p, place in zip(layer.parameters, slices, strict=False)]


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
