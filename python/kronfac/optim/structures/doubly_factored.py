"""Layers whose input factor is itself a Kronecker product: F ≈ K ⊗ Ψ ⊗ G, three small inverses instead of A's.

Ba, Grosse & Martens, "Distributed second-order optimization using Kronecker-factored approximations" (2017), the
section on the doubly-factored approximation. The bias is a block of its own: its Fisher block is ratio · G, and how it
varies together with the weights is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kronfac.curvature import GradientRows, InputFactors, LayerAdapter
from kronfac.curvature.doubly_factored import input_shape
from kronfac.linalg.damped import PI_RANGE, damped_inverses, eigenbases
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, WithoutRows, finish, per_layer

LARGEST_A = 8192
"""Inputs above which structure="kfac" factors a layer doubly. A of such a layer takes more than 256 MiB in float32, and
while it is renewed there are three such matrices: the average, the fresh sum, and the inverse."""

LARGEST_A_IF_ASKED = 1024
"""Inputs above which structure="doubly_factored" does. Up to there A takes 4 MiB and its inverse 20 ms of one core:
there is nothing to save, and A ⊗ G approximates better."""

_T = TypeVar("_T", bound="DoublyFactored")
_LEAST_SHARE = PI_RANGE**-1.5  # of the largest mean; keeps each share of the damping within PI_RANGE


def damping_of_three(means: Tensor, damping: Tensor) -> Tensor:
    """Split λ over three factors: factored Tikhonov damping with a cube root in place of the square root.

    The damping of factor f is ∛λ m_f / ∛(m₁ m₂ m₃), m_f its mean eigenvalue: the three multiply to λ, and each is the
    same part of its factor's mean. For two factors the same rule is π√λ and √λ/π.

    Args:
        means: mean eigenvalue of each factor, (3, layers), >= 0. Means below 10⁻⁹ of the layer's largest count as that,
            so that a vanishing factor is damped all the same.
        damping: λ, (layers,).

    Returns:
        (3, layers).
    """
    largest = means.amax(0)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    # Negative means can only be rounding of zero. Relative to the largest nothing under- or overflows.
    logs = (means / largest).clamp(min=_LEAST_SHARE).log()
    return (logs - logs.mean(0) + damping.log() / 3).exp()


def factor_doubly(adapter: LayerAdapter, above: float) -> None:
    """Have a layer with more than `above` inputs (the bias not counted) keep K and Ψ instead of A, where it can.

    Args:
        adapter: of the layer, changed in place. One whose inputs cannot be read as matrices keeps its A.
        above: the largest number of inputs for which A is kept.
    """
    shape = input_shape(adapter)
    if shape is not None and adapter.in_features > above:
        adapter.block, adapter.input_shape = "doubly_factored", shape


class DoublyFactored(WithoutRows):
    """What both ways of inverting share.

    Args:
        shape: (d1, d2) of the inputs of the layers that `shapes` and `factorise` are about; `apply` follows the
            factorisations.
    """

    def __init__(self, shape: tuple[int, int] = (1, 1)) -> None:
        self._shape = shape

    def of_shape(self: _T, shape: tuple[int, int]) -> _T:
        """The structure for layers with inputs of a shape."""
        return type(self)(shape)

    def _unpack(self, pair: Averages) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K, Ψ / ratio, G and the ratio: E[a aᵀ] ≈ K ⊗ Ψ / ratio."""
        K, Psi, ratio = InputFactors.of(pair.A, self._shape)
        return K, Psi / ratio, pair.G, ratio


class DoublyFactoredInverse(DoublyFactored):
    """P = (K + c₁I)⁻¹ ⊗ (Ψ + c₂I)⁻¹ ⊗ (G + c₃I)⁻¹ V with c₁c₂c₃ = λ, V read as (out, d1, d2).

    The bias shares the inverse of G: (ratio + λ/c₃)⁻¹ (G + c₃I)⁻¹ v, factored damping of ratio · G.
    """

    name = "doubly_factored/inverse"
    by_rows = True

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Inverses of the damped K, Ψ (with the ratio in it) and G, and what the bias is multiplied by besides."""
        del inputs
        d1, d2 = self._shape
        return {"K": (d1, d1), "Psi": (d2, d2), "left": (outputs, outputs), "bias": (1,)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`. A layer counts as inverted when its three factors are."""
        triples = [self._unpack(pair) for pair in factors]
        lambdas = per_layer(damping, [pair.G for pair in factors])
        means = torch.stack([torch.stack([f.diagonal().mean() for f in triple[:3]]) for triple in triples], 1)
        shares = damping_of_three(means, lambdas)
        inverses = damped_inverses([triple[i] for i in range(3) for triple in triples], shares.flatten())
        values: list[Factorisation | None] = []
        count = len(factors)
        for index, triple in enumerate(triples):
            K, Psi, left = (inverses.values[index + side * count] for side in range(3))
            if K is None or Psi is None or left is None:
                values.append(None)
                continue
            bias = (triple[3] + lambdas[index] / shares[2, index]).reciprocal()
            values.append({"K": K, "Psi": Psi, "left": left, "bias": bias.reshape(1)})
        return Factorised(values, inverses.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`; `damping` is already inside the inverses."""
        del damping
        out = []
        for grad, f in zip(grads, factorisations, strict=True):
            weight, bias = _parts(grad.to(f["K"].dtype), len(f["K"]), len(f["Psi"]))
            inner = f["K"] @ (weight @ f["Psi"])
            out.append(_joined(f["left"], inner, None if bias is None else bias * f["bias"]))
        return finish(grads, out)

    def apply_rows(self, rows: GradientRows, factorisation: Factorisation) -> tuple[Tensor, Tensor]:
        """See `Structure.apply_rows`: (g G⁻¹)ᵀ [K⁻¹ a Ψ⁻¹, bias]."""
        K, Psi, left, x, g = *(factorisation[key] for key in ("K", "Psi", "left")), rows.x, rows.g
        assert g is not None
        y = g @ left
        z = (K @ (x.reshape(-1, len(K), len(Psi)) @ Psi)).flatten(1)
        pairs = z @ x.mT
        if rows.adapter.has_bias:
            bias = factorisation["bias"]
            pairs.add_(bias)
            z = torch.cat([z, bias.expand(len(z), 1)], 1)
        # ⟨yᵀ z, gᵀ [x 1]⟩ is the sum over all pairs of rows of ⟨y_i, g_j⟩ ⟨z_i, [x_j 1]⟩.
        dot = (y @ g.mT).mul_(pairs).sum(dtype=torch.float64).to(pairs.dtype)
        return y.mT @ z, dot


class DoublyFactoredEigen(DoublyFactored):
    """Exact damping in the triple eigenbasis: V̂ ⊘ (λ_G λ_K λ_Ψ + λ), and λ_G · ratio + λ for the bias.

    λ may change at every step. The products of eigenvalues are formed when they are needed, not kept.
    """

    name = "doubly_factored/eigen"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Eigenvectors and eigenvalues of K, Ψ (with the ratio in it) and G, and the ratio."""
        del inputs
        sizes = {"K": self._shape[0], "Psi": self._shape[1], "left": outputs}
        vectors = {f"{name}_vectors": (size, size) for name, size in sizes.items()}
        return {**vectors, **{f"{name}_values": (size,) for name, size in sizes.items()}, "bias": (1,)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`. The factors are diagonalised undamped: λ enters once, in `apply`."""
        del damping
        triples = [self._unpack(pair) for pair in factors]
        bases = eigenbases([triple[i] for i in range(3) for triple in triples])
        values: list[Factorisation | None] = []
        for index, triple in enumerate(triples):
            value: Factorisation = {"bias": triple[3].reshape(1).clone()}
            for side, name in enumerate(("K", "Psi", "left")):
                basis = bases.values[index + side * len(triples)]
                if basis is not None:
                    value[f"{name}_values"], value[f"{name}_vectors"] = basis
            values.append(value if len(value) == 7 else None)
        return Factorised(values, bases.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        lambdas = per_layer(damping, [f["K_values"] for f in factorisations])
        out = []
        for grad, f, shift in zip(grads, factorisations, lambdas, strict=True):
            K, Psi, left = f["K_vectors"], f["Psi_vectors"], f["left_vectors"]
            weight, bias = _parts(grad.to(K.dtype), len(K), len(Psi))
            rotated = (left.mT @ (K.mT @ (weight @ Psi)).flatten(1)).view(weight.shape)
            products = f["left_values"][:, None, None] * (f["K_values"][:, None] * f["Psi_values"])
            divided = K @ (rotated.div_(products.add_(shift)) @ Psi.mT)
            if bias is not None:
                bias = (left.mT @ bias) / (f["left_values"] * f["bias"] + shift).unsqueeze(1)
            out.append(_joined(left, divided, bias))
        return finish(grads, out)


def _parts(grad: Tensor, d1: int, d2: int) -> tuple[Tensor, Tensor | None]:
    """V as (out, d1, d2), and the bias's column (out, 1) where there is one."""
    weight = grad[:, : d1 * d2].reshape(-1, d1, d2)
    return weight, grad[:, d1 * d2 :] if grad.shape[1] > d1 * d2 else None


def _joined(left: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of left and (out, d1, d2) and (out, 1) as one matrix (out, in[+1])."""
    flat = weight.flatten(1)
    return left @ (flat if bias is None else torch.cat([flat, bias], 1))
