"""How the factors of a layer are inverted and applied; `structure_for` chooses.

The option `structure` says how a Kronecker-factored block is handled, or what is put in its place where the layer
yields its inputs and gradients in pairs (`LayerAdapter.has_pairs`). Blocks of another kind (`LayerAdapter.block`: a
diagonal input factor, a small dense block) have structures of their own beside it, and layers in groups are any
structure's blocks group by group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kronfac.curvature import LayerAdapter
from kronfac.optim.structures.base import Averages as Averages
from kronfac.optim.structures.base import Factorisation as Factorisation
from kronfac.optim.structures.base import Factorised as Factorised
from kronfac.optim.structures.base import Kind as Kind
from kronfac.optim.structures.base import Structure as Structure
from kronfac.optim.structures.dense import DenseEigen, DenseInverse
from kronfac.optim.structures.diagonal import Diagonal
from kronfac.optim.structures.diagonal_input import DiagonalInputEigen, DiagonalInputInverse
from kronfac.optim.structures.doubly_factored import (
    LARGEST_A,
    LARGEST_A_IF_ASKED,
    DoublyFactored,
    DoublyFactoredEigen,
    DoublyFactoredInverse,
    factor_doubly,
)
from kronfac.optim.structures.ekfac import Ekfac
from kronfac.optim.structures.grouped import Grouped
from kronfac.optim.structures.kronecker import KroneckerEigen, KroneckerInverse
from kronfac.optim.structures.mini_block import MiniBlock
from kronfac.optim.structures.tridiagonal import TridiagonalInverse

STRUCTURES = ("kfac", "ekfac", "diagonal", "mini_block", "doubly_factored", "tridiagonal")
"""What the option `structure` may be."""

_KRONECKER: Mapping[str, type[Structure]] = {"inverse": KroneckerInverse, "eigen": KroneckerEigen}
_OTHERS: Mapping[str, Mapping[Kind, type[Structure]]] = {
    "inverse": {
        "doubly_factored": DoublyFactoredInverse,
        "diagonal_input": DiagonalInputInverse,
        "dense": DenseInverse,
    },
    "eigen": {
        "doubly_factored": DoublyFactoredEigen,
        "diagonal_input": DiagonalInputEigen,
        "dense": DenseEigen,
    },
}


@dataclass(frozen=True)
class Structures:
    """A structure for every kind of block.

    Attributes:
        name: of the structure and the way it is inverted; a checkpoint of another name is refused.
        by_block: the structure of each kind.
        largest_input: inputs of a layer above which it is factored doubly.
    """

    name: str
    by_block: Mapping[Kind, Structure]
    largest_input: float = LARGEST_A

    @property
    def chains(self) -> bool:
        """Whether consecutive layers are preconditioned together."""
        return self.name == TridiagonalInverse.name

    @property
    def by_rows(self) -> bool:
        """Whether gradients given by their rows are of use to any layer."""
        # Layers that have rows have pairs.
        return "pairs" not in self.by_block and any(structure.by_rows for structure in self.by_block.values())

    def kind(self, adapter: LayerAdapter) -> Kind:
        """Which structure of `by_block` handles a layer."""
        joint = "pairs" in self.by_block and adapter.has_pairs and adapter.block == "kronecker"
        return "pairs" if joint else adapter.block

    def prepare(self, adapter: LayerAdapter) -> None:
        """Choose the kind of block where there is a choice; before the adapter has taken any statistics."""
        factor_doubly(adapter, self.largest_input)

    def of(self, adapter: LayerAdapter) -> Structure:
        """The structure that `factorise` is to be called on for a layer."""
        structure = self.by_block[self.kind(adapter)]
        if isinstance(structure, DoublyFactored) and adapter.input_shape is not None:
            return structure.of_shape(adapter.input_shape)
        return structure

    def shapes(self, adapter: LayerAdapter) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a layer's `Factorisation`."""
        inputs, outputs = adapter.factor_sizes
        shapes, groups = self.of(adapter).shapes(outputs, inputs), adapter.groups
        return {key: shape if groups == 1 else (groups, *shape) for key, shape in shapes.items()}


def structure_for(structure: str, solve: str) -> Structures:
    """The structures that KFAC's options `structure` and `solve` name (both checked by the caller).

    "ekfac" lives in the eigenbasis, where exact damping costs nothing more: `solve` is "eigen" then for every layer.
    """
    if structure == "ekfac":
        solve = "eigen"
    kronecker = TridiagonalInverse() if structure == "tridiagonal" else _KRONECKER[solve]()
    by_block: dict[Kind, Structure] = {block: kind() for block, kind in _OTHERS[solve].items()}
    by_block["kronecker"] = Grouped(kronecker)
    if structure == "ekfac":
        by_block["pairs"] = Grouped(Ekfac())
        return Structures("ekfac", by_block)
    name = f"{structure}/{solve}"
    if structure == "diagonal":  # which has no A that could be too large
        by_block["pairs"] = Diagonal()
        return Structures(name, by_block, math.inf)
    if structure == "mini_block":
        by_block["pairs"] = MiniBlock(kronecker)
    return Structures(name, by_block, LARGEST_A_IF_ASKED if structure == "doubly_factored" else LARGEST_A)
