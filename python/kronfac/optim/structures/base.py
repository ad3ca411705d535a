"""The second axis of the optimizer: how the factors of a layer are inverted and applied.

The first axis, how a layer yields its factors, is `kronfac.curvature.LayerAdapter`. A structure sees factors and
gradient matrices only, never modules, so every structure works with every layer type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from kronfac.curvature import ExtraStatistic, GradientRows, LayerAdapter
from kronfac.curvature.adapter import Block
from kronfac.optim import reading

Kind: TypeAlias = Block | Literal["pairs"]
"""What a layer's curvature is made of: a kind of block of A and G, or joint statistics of inputs and gradients."""

Factorisation: TypeAlias = "dict[str, Tensor]"
"""What `Structure.factorise` keeps per layer: tensors by name, which is also what a checkpoint stores."""


class Averages(NamedTuple):
    """Undamped running averages of one layer.

    Attributes:
        A: as in `kronfac.curvature.KroneckerFactors`; (0, in) where the structure does without.
        G: likewise; (0, out) there.
        extra: of the further statistics that the structure has asked for, by name; one that could not be taken so far
            is absent.
    """

    A: Tensor
    G: Tensor
    extra: Mapping[str, Tensor]


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

    @property
    def needs_factors(self) -> bool:
        """Whether A and G are needed."""

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of a layer's `Factorisation`; a checkpoint is checked against it."""

    def statistics(self, adapter: LayerAdapter) -> Mapping[str, ExtraStatistic]:
        """The further statistics to take of a layer, by name; new ones at each call.

        Their averages are in `Averages.extra`, and `apply` finds them in the layer's factorisation, whose own tensors
        have other names. Those of a layer in groups carry the groups in front, as its factors do.
        """

    def renew(self, statistics: Mapping[str, ExtraStatistic], factorisation: Factorisation | None) -> None:
        """Tell a layer's further statistics which factorisation holds until the next step."""

    def carry(self, averages: Averages, old: Factorisation | None, new: Factorisation) -> Mapping[str, Tensor]:
        """The further averages in terms of a new factorisation; called when it replaces the old one.

        Args:
            averages: of the layer, in terms of the old factorisation, with groups in front where it has some.
            old: what the factorisation replaces, None at first.
            new: the factorisation.
        """

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """Prepare the inverses of A ⊗ G + λI. Never raises for numerical reasons; may wait for the device."""

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """Precondition the gradient matrices without host synchronisation.

        Args:
            grads: V_i (out_i, in_i).
            factorisations: what `factorise` returned for these layers, at this step or an earlier one, together with
                the further averages as they are now.
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


class FactorsOnly:
    """For structures that are made of A and G alone, or of statistics that no factorisation changes."""

    needs_factors = True

    def statistics(self, adapter: LayerAdapter) -> Mapping[str, ExtraStatistic]:
        """None."""
        del adapter
        return {}

    def renew(self, statistics: Mapping[str, ExtraStatistic], factorisation: Factorisation | None) -> None:
        """There is nobody to tell."""

    def carry(self, averages: Averages, old: Factorisation | None, new: Factorisation) -> Mapping[str, Tensor]:
        """They stay."""
        del old, new
        return averages.extra


class WithoutRows(FactorsOnly):
    """The same for those that need the gradient matrix itself."""

    by_rows = False

    def apply_rows(self, rows: GradientRows, factorisation: Factorisation) -> tuple[Tensor, Tensor]:
        """There is no such way."""
        raise AssertionError(f"{type(self).__name__}.apply_rows: called although by_rows is False")


def per_layer(values: Sequence[float], like: Sequence[Tensor]) -> Tensor:
    """`values` as a tensor beside `like`; equal values are filled on the device instead of being copied there."""
    dtype, device = like[0].dtype, like[0].device
    limits = torch.finfo(dtype)
    # A Python float below or above the dtype's range would arrive as 0 or infinity.
    fitted = [min(max(value, limits.tiny), limits.max) for value in values]
    if len(set(fitted)) == 1:
        return torch.full((len(fitted),), fitted[0], dtype=dtype, device=device)
    if reading.at_hand(like[0]):
        return torch.tensor(fitted, dtype=dtype, device=device)
    # A copy from the host would make it wait. Layers of one param group mostly lie side by side.
    runs = [(value, len(list(run))) for value, run in groupby(fitted)]
    return torch.cat([torch.full((length,), value, dtype=dtype, device=device) for value, length in runs])


def finish(grads: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The results of `Structure.apply`: P in the dtype of V, and ⟨P, V⟩ of P before it is rounded to that."""
    dots = [products.sum() for products in torch._foreach_mul(list(out), list(grads))]
    rounded = [p if p.dtype == grad.dtype else p.to(grad.dtype) for p, grad in zip(out, grads, strict=True)]
    return rounded, torch.stack(dots)
