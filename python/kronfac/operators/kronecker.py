"""Block-diagonal Kronecker-factored curvature as an operator: products, inverse and what has a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from kronfac.curvature import KroneckerFactors, LayerAdapter
from kronfac.linalg import eigenbases
from kronfac.operators.algebra import ParameterOperator, Restricted
from kronfac.operators.parameters import ParameterLayout


@dataclass(frozen=True, eq=False)
class EigenForm:
    """A layer's block Q diag(spectrum) Qᵀ with Q = Q_G ⊗ Q_A, on matrices V (..., out, in[+1]).

    Attributes:
        left: Q_G (out, out), with groups in front where the layer has some, like the others.
        right: Q_A (in[+1], in[+1]); None for the identity.
        spectrum: eigenvalues (out, in[+1]).
    """

    left: Tensor
    right: Tensor | None
    spectrum: Tensor

    def apply(self, V: Tensor) -> Tensor:
        """Q_G [(Q_Gᵀ V Q_A) ∘ spectrum] Q_Aᵀ."""
        inside = self.left.mT @ (V if self.right is None else V @ self.right)
        out = self.left @ (inside * self.spectrum)
        return out if self.right is None else out @ self.right.mT

    def eigen(self) -> EigenForm:
        """The form itself."""
        return self

    def diagonal(self) -> Tensor:
        """The diagonal of the block, shaped like V."""
        rows = self.left.square() @ self.spectrum
        return rows if self.right is None else rows @ self.right.square().mT

    def trace(self) -> float:
        """The trace of the block."""
        return float(self.spectrum.sum(dtype=torch.float64))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> EigenForm:
        """The block with a function applied to its eigenvalues."""
        return EigenForm(self.left, self.right, function(self.spectrum))


@dataclass(frozen=True, eq=False)
class ProductForm:
    """A layer's block A ⊗ G: V becomes G V A.

    Attributes:
        name: of the layer, for error messages.
        A: (in[+1], in[+1]), with groups in front where the layer has some; (in,) where it is diagonal.
        G: (out, out), likewise.
    """

    name: str
    A: Tensor
    G: Tensor

    def apply(self, V: Tensor) -> Tensor:
        """G V A."""
        return self.G @ V * self.A if self.A.dim() == 1 else self.G @ V @ self.A

    @cached_property
    def _eigen(self) -> EigenForm:
        left, values_G = self._basis("G", self.G)
        if self.A.dim() == 1:
            return EigenForm(left, None, values_G.unsqueeze(-1) * self.A.clamp(min=0))
        right, values_A = self._basis("A", self.A)
        return EigenForm(left, right, values_G.unsqueeze(-1) * values_A.unsqueeze(-2))

    def eigen(self) -> EigenForm:
        """The same block in its eigenbasis, which is computed once.

        Raises:
            ValueError: a factor could not be diagonalised.
        """
        return self._eigen

    def diagonal(self) -> Tensor:
        """The diagonal of the block, shaped like V."""
        inputs = self.A if self.A.dim() == 1 else self.A.diagonal(dim1=-2, dim2=-1)
        return self.G.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * inputs.unsqueeze(-2)

    def trace(self) -> float:
        """The trace of the block."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def _basis(self, which: str, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors and eigenvalues of a factor or of each group's."""
        bases = eigenbases(list(factor.reshape(-1, *factor.shape[-2:]).unbind())).values
        whole = [basis for basis in bases if basis is not None]
        if len(whole) < len(bases):
            raise ValueError(
                f"kronfac.operators: {which} of layer {self.name!r}: expected a finite symmetric matrix, got one that "
                "could not be diagonalised"
            )
        vectors = torch.stack([basis[1] for basis in whole]).view(factor.shape)
        return vectors, torch.stack([basis[0] for basis in whole]).view(factor.shape[:-1])


BlockForm: TypeAlias = "ProductForm | EigenForm"


@dataclass(frozen=True, eq=False)
class LayerBlock:
    """The curvature of one layer, and where its entries lie.

    Attributes:
        name: of the layer.
        owners: positions of its parameters among those of the operator.
        shape: of V, (out, in[+1]) or (groups, out, in[+1]).
        entries: index in the flat vector of every entry of V, int64.
        form: of the block.
    """

    name: str
    owners: tuple[int, ...]
    shape: tuple[int, ...]
    entries: Tensor
    form: BlockForm

    @staticmethod
    def at(
        name: str, adapter: LayerAdapter, owners: Sequence[int], layout: ParameterLayout, form: BlockForm
    ) -> LayerBlock:
        """The block of a layer whose parameters are at the positions `owners` of a layout."""
        shape = adapter.matrix_shape
        entries = torch.empty(math.prod(shape), dtype=torch.int64)
        numbered = adapter.split(torch.arange(len(entries)).view(shape))
        for index, (position, part) in enumerate(zip(owners, numbered, strict=True)):
            first, last = layout.offsets[position], layout.offsets[position + 1]
            flat = torch.arange(first, last).view(layout.shapes[position])
            entries[part.reshape(-1)] = (flat if adapter.slices is None else flat[adapter.slices[index]]).reshape(-1)
        return LayerBlock(name, tuple(owners), shape, entries.to(layout.device), form)

    def moved(self, positions: Sequence[int], before: ParameterLayout, after: ParameterLayout) -> LayerBlock:
        """The same block in the layout of some of the parameters."""
        steps = torch.zeros(before.size, dtype=torch.int64, device=self.entries.device)
        for new, old in enumerate(positions):
            steps[before.offsets[old] : before.offsets[old + 1]] = after.offsets[new] - before.offsets[old]
        owners = tuple(list(positions).index(owner) for owner in self.owners)
        return LayerBlock(self.name, owners, self.shape, self.entries + steps[self.entries], self.form)


class KroneckerOperator(ParameterOperator):
    """Block-diagonal curvature, layer by layer a Kronecker product or given in a Kronecker-factored eigenbasis.

    Made by `kronfac.operators.kfac`, `kronfac.operators.ekfac`, and by `inverse` of either. Unlike the Hessian it does
    not follow the model: it is of the parameters that the model had when it was made. No product reads the data.

    Attributes:
        names: the parameters it acts on, as in `model.named_parameters()`.
    """

    def __init__(self, layout: ParameterLayout, layers: Sequence[LayerBlock], label: str) -> None:
        super().__init__(layout)
        self._layers = tuple(layers)
        self._label = label

    @property
    def label(self) -> str:
        """Which matrix it is."""
        return self._label

    def factors(self) -> dict[str, KroneckerFactors]:
        """A and G by layer name, of the layers whose block is their Kronecker product: all of K-FAC, none of inverses.

        For reduction="sum" G carries the number of terms.
        """
        return {
            layer.name: KroneckerFactors(layer.form.A, layer.form.G)
            for layer in self._layers
            if isinstance(layer.form, ProductForm)
        }

    def inverse(self, damping: float) -> KroneckerOperator:
        """The inverse of this operator plus `damping` times the identity, as an operator.

        The damping is exact: every layer's block is diagonalised by the eigenvectors of its factors, once, and
        `damping` is added to the products of their eigenvalues. This is no factored damping (A + π√λ I) ⊗
        (G + √λ/π I), which `kronfac.KFAC` uses by default.

        Args:
            damping: λ > 0, in the units of the curvature.

        Returns:
            The operator, also for use as the preconditioner of `kronfac.linalg.cg` with shift=λ.

        Raises:
            TypeError: no number.
            ValueError: not finite or not positive; a factor that could not be diagonalised.
        """
        shift = _check_damping(damping, f"{self.caller}: inverse", positive=True)
        label = f"({self.label} + {shift:.6g})⁻¹"
        return self._mapped(lambda spectrum: (spectrum + shift).reciprocal(), label)

    def inverse_sqrt(self, damping: float) -> KroneckerOperator:
        """The symmetric square root R of `inverse(damping)`, as an operator.

        R @ A @ R is symmetric where A is: preconditioning for what takes no preconditioner. `minres(R @ A @ R, R @ b)`
        gives R⁻¹x for the solution x of A x = b, and R @ z with standard normal z has the covariance of the inverse.

        Args:
            damping: as in `inverse`.

        Returns:
            The operator.

        Raises:
            TypeError, ValueError: as `inverse`.
        """
        shift = _check_damping(damping, f"{self.caller}: inverse_sqrt", positive=True)
        return self._mapped(lambda spectrum: (spectrum + shift).rsqrt(), f"({self.label} + {shift:.6g})^-½")

    def trace(self) -> float:
        """The trace, in closed form: Σ tr A · tr G."""
        return sum(layer.form.trace() for layer in self._layers)

    def logdet(self, damping: float = 0.0) -> float:
        """The logarithm of the determinant of this operator plus `damping` times the identity, by the eigenvalues.

        Args:
            damping: λ >= 0. With 0 a singular matrix gives minus infinity or, where rounding hides that it is
                singular, a large negative number.

        Raises:
            TypeError: no number.
            ValueError: not finite or negative; a factor that could not be diagonalised.
        """
        shift = _check_damping(damping, f"{self.caller}: logdet", positive=False)
        spectra = [layer.form.eigen().spectrum.to(torch.float64) for layer in self._layers]
        return sum(float((spectrum + shift).log().sum()) for spectrum in spectra)

    def diagonal(self) -> Tensor:
        """The diagonal (n,), in closed form."""
        out = torch.zeros(self._layout.size, dtype=self.dtype, device=self.device)
        for layer in self._layers:
            out[layer.entries] = layer.form.diagonal().reshape(-1).to(out)
        return out

    def _mapped(self, function: Callable[[Tensor], Tensor], label: str) -> KroneckerOperator:
        layers = [replace(layer, form=layer.form.eigen().mapped(function)) for layer in self._layers]
        return KroneckerOperator(self._layout, layers, label)

    def _multiply(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for layer in self._layers:
            form = layer.form
            like = form.G if isinstance(form, ProductForm) else form.spectrum
            V = rows[:, layer.entries].view(len(rows), *layer.shape).to(like)
            out[:, layer.entries] = form.apply(V).reshape(len(rows), -1).to(out)
        return out

    def _restricted(self, positions: Sequence[int]) -> ParameterOperator:
        touched = [layer for layer in self._layers if set(layer.owners) & set(positions)]
        if not all(set(layer.owners) <= set(positions) for layer in touched):
            return Restricted(self, positions)
        layout = self._layout.subset(positions)
        layers = [layer.moved(positions, self._layout, layout) for layer in touched]
        return KroneckerOperator(layout, layers, self.label)


def _check_damping(value: object, caller: str, *, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: damping: expected a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "a finite number greater than 0" if positive else "a finite number, at least 0"
        raise ValueError(f"{caller}: damping: expected {wanted}, got {value}")
    return float(value)
