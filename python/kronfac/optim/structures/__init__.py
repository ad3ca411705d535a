"""How the factors of a layer are inverted and applied; `structure_for` chooses.

The option `structure` says how a Kronecker-factored block is handled. Blocks of another kind (`LayerAdapter.block`: a
diagonal input factor, a small dense block) have structures of their own beside it, and layers in groups are any
structure's blocks group by group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kronfac.curvature import ExtraStatistic, LayerAdapter
from kronfac.curvature.adapter import Block
from kronfac.optim.structures.base import Averages as Averages
from kronfac.optim.structures.base import Factorisation as Factorisation
from kronfac.optim.structures.base import Factorised as Factorised
from kronfac.optim.structures.base import Structure as Structure
from kronfac.optim.structures.dense import DenseEigen, DenseInverse
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

_KRONECKER: dict[tuple[str, str], type[Structure]] = {
    ("kfac", "inverse"): KroneckerInverse,
    ("kfac", "eigen"): KroneckerEigen,
    ("ekfac", "eigen"): Ekfac,
    ("doubly_factored", "inverse"): KroneckerInverse,  # of the layers that are small enough
    ("doubly_factored", "eigen"): KroneckerEigen,
}
ALWAYS_EIGEN = ("ekfac",)
"""Structures that are applied in an eigenbasis, whatever `solve` is."""
_OTHERS: dict[str, dict[Block, type[Structure]]] = {
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
        name: of the structure of Kronecker-factored blocks; a checkpoint of another name is refused.
        by_block: the structure of each kind.
        largest_input: inputs of a layer above which it is factored doubly.
    """

    name: str
    by_block: Mapping[Block, Structure]
    largest_input: int = LARGEST_A

    @property
    def by_rows(self) -> bool:
        """Whether gradients given by their rows are of use to any layer."""
        return any(structure.by_rows for structure in self.by_block.values())

    def statistics(self, adapter: LayerAdapter) -> Mapping[str, ExtraStatistic]:
        """The further statistics of a layer, by name."""
        return self.by_block[adapter.block].statistics(adapter)

    def prepare(self, adapter: LayerAdapter) -> None:
        """Choose the kind of block where there is a choice; before the adapter has taken any statistics."""
        factor_doubly(adapter, self.largest_input)

    def of(self, adapter: LayerAdapter) -> Structure:
        """The structure that `factorise` is to be called on for a layer."""
        structure = self.by_block[adapter.block]
        if isinstance(structure, DoublyFactored) and adapter.input_shape is not None:
            return structure.of_shape(adapter.input_shape)
        return structure

    def shapes(self, adapter: LayerAdapter) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a layer's `Factorisation`."""
        inputs, outputs = adapter.factor_sizes
        shapes, groups = self.of(adapter).shapes(outputs, inputs), adapter.groups
        return {key: shape if groups == 1 else (groups, *shape) for key, shape in shapes.items()}


def structure_for(structure: str, solve: str) -> Structures:
    """The structures that KFAC's options `structure` and `solve` name (both checked by the caller)."""
    if structure in ALWAYS_EIGEN:
        solve = "eigen"
    kronecker = _KRONECKER[structure, solve]()
    others = {block: kind() for block, kind in _OTHERS[solve].items()}
    name = kronecker.name if structure in ("kfac", "ekfac") else f"{structure}/{solve}"
    largest = LARGEST_A_IF_ASKED if structure == "doubly_factored" else LARGEST_A
    return Structures(name, {"kronecker": Grouped(kronecker), **others}, largest)
