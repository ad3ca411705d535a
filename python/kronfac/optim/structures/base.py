"""The second axis of the optimizer: how the factors of a layer are inverted and applied.

The first axis, how a layer yields its factors, is `kronfac.curvature.LayerAdapter`. A structure sees factors and
gradient matrices only, never modules, so every structure works with every layer type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from kronfac.curvature import GradientRows, KroneckerFactors

Factorisation: TypeAlias = "dict[str, Tensor]"
"""What `Structure.factorise` keeps per layer: tensors by name, which is also what a checkpoint stores."""


@dataclass(frozen=True)
class Factorised:
    """What one call of `Structure.factorise` achieved.

    Attributes:
        values: a factorisation per layer, None where a factor resisted every attempt.
        retried: how many factors needed more damping than asked for.
    """

    values: list[Factorisation | None]
    retried: int


class Structure(Protocol):
    """Inverts and applies the curvature of several layers at once.

    All layers of one call share a dtype (float32 or float64) and a device. Layer i has factors A (in, in) and G (out,
    out) and a gradient matrix V (out, in), where `in` counts the bias column.
    """

    @property
    def name(self) -> str:
        """Names the structure and the way it is inverted; a checkpoint of another name is refused."""

    @property
    def by_rows(self) -> bool:
        """Whether `apply_rows` is there."""

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of a layer's `Factorisation`; a checkpoint is checked against it."""

    def factorise(self, factors: Sequence[KroneckerFactors], damping: Sequence[float]) -> Factorised:
        """Prepare the inverses of A ⊗ G + λI. Never raises for numerical reasons; may wait for the device."""

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """Precondition the gradient matrices without host synchronisation.

        Args:
            grads: V_i (out_i, in_i).
            factorisations: what `factorise` returned for these layers, at this step or an earlier one.
            damping: λ_i now, which may differ from the one the factorisation was made with.

        Returns:
            P_i (out_i, in_i) in the dtype of V_i, and ⟨P_i, V_i⟩ as one tensor (number of layers,).
        """

    def apply_rows(self, rows: GradientRows, factorisation: Factorisation) -> tuple[Tensor, Tensor]:
        """Precondition V = gᵀ [a 1] from its rows, without V; called only where `by_rows` and the rows form V.

        Args:
            rows: of one layer; `GradientRows.form` has said yes.
            factorisation: of the layer.

        Returns:
            P (out, in), and ⟨P, V⟩ of shape ().
        """
