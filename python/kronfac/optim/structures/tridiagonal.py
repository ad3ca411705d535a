"""Chains of layers whose inverse Fisher matrix is approximated as block-tridiagonal.

Martens & Grosse, arXiv:1503.05671, section 4.3 and appendix B. The gradients of consecutive layers are taken to be a
Gaussian Markov chain that matches the Kronecker-factored blocks F̃ on and next to the diagonal,
F̃_{i,j} = Ā_{i,j} ⊗ G_{i,j}, with Ā_{i,j} = E[ā_i ā_jᵀ] of the layers' inputs and G_{i,j} = E[g_i g_jᵀ]. Then
F̂⁻¹ = Ξᵀ Σ⁻¹ Ξ, where Ξ is unit upper bidiagonal in -Ψ_i and Σ block-diagonal:

    Ψ_i = F̃_{i,i+1} F̃_{i+1,i+1}⁻¹ = Ψ^A_i ⊗ Ψ^G_i
    Σ_i = F̃_{i,i} - Ψ_i F̃_{i+1,i+1} Ψ_iᵀ, and Σ = F̃ of the last layer of a chain.

Damping enters before: the diagonal factors are Ā + π√λ I and G + √λ/π I with the layer's own λ and π throughout, the
cross factors are undamped. In exact arithmetic each Σ_i then is positive definite, being at least F̃_{i,i} damped less
F̃_{i,i} undamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac import ops
from kronfac.linalg.damped import eigenbases, factored_damping
from kronfac.optim.structures.base import Averages, Factorisation, finish, per_layer
from kronfac.optim.structures.kronecker import KroneckerInverse

LINKED = ("left_vectors", "right_vectors", "eigenvalues", "psi_A", "psi_G")
"""What a layer with a successor has in its factorisation besides the inverses of its own damped factors."""


CROSS = ("next_A", "next_G")
"""The further averages of a layer with a successor: Ā_{i,i+1} (in_i, in_{i+1}) and G_{i,i+1} (out_i, out_{i+1})."""


@dataclass(frozen=True)
class Pair:
    """Two consecutive layers, i and j, of a chain.

    Attributes:
        factors: undamped, of i, with its `CROSS` averages.
        inverses: the inverses of the damped factors of j, as `KroneckerInverse.factorise` returns them.
        damping: λ of i.
    """

    factors: Averages
    inverses: Factorisation
    damping: float


class TridiagonalInverse(KroneckerInverse):
    """K-FAC for single layers, and what couples the layers of a chain beside it."""

    name = "tridiagonal/inverse"
    by_rows = False  # the directions of a chain need the gradients of its neighbours as matrices


def link(pairs: Sequence[Pair]) -> list[Factorisation | None]:
    """Ψ_i and the inverse of Σ_i of several pairs of one dtype and device.

    Σ⁻¹ is applied by simultaneous diagonalisation (appendix B, with Cholesky factors in place of symmetric roots):
    for the damped A and G of layer i, A = LLᵀ, C = Ψ^A Ā_{j,j} Ψ^Aᵀ and L⁻¹ C L⁻ᵀ = E diag(s) Eᵀ, the matrix
    K_A = L⁻ᵀE turns A into I and C into diag(s), likewise for G, and
    Σ⁻¹ u = K_G [(K_Gᵀ U K_A) ⊘ (1 - s_G s_Aᵀ)] K_Aᵀ.

    Returns:
        The tensors named `LINKED` of each pair; None where the statistics of the two layers, or rounding, leave no
        positive definite Σ_i: the layer is then to be treated as the last of its chain. Waits for the device.
    """
    if not pairs:
        return []
    like = [pair.factors.A for pair in pairs]
    lambdas = per_layer([pair.damping for pair in pairs], like)
    shares = torch.stack(factored_damping(like, [pair.factors.G for pair in pairs], lambdas)).T
    noise = torch.finfo(like[0].dtype).eps ** 0.5
    roots: list[Tensor] = []
    middles: list[Tensor] = []
    psis: list[Tensor] = []
    for pair, share in zip(pairs, shares, strict=True):
        cross = [pair.factors.extra[key] for key in CROSS]
        sides = ((pair.factors.A, cross[0], "right"), (pair.factors.G, cross[1], "left"))
        for own, (factor, between, key) in zip(share, sides, strict=True):
            lower, info = torch.linalg.cholesky_ex(
                factor + own * torch.eye(len(factor), dtype=own.dtype, device=own.device)
            )
            # A failure shows as NaN from here on; what goes wrong is settled below, at one place.
            lower = torch.where(info == 0, lower, torch.full_like(lower, float("nan")))
            psi = between @ pair.inverses[key]
            half = torch.linalg.solve_triangular(lower, psi @ between.mT, upper=False)
            middle = torch.linalg.solve_triangular(lower, half.mT, upper=False)
            roots.append(lower)
            psis.append(psi)
            middles.append((middle + middle.mT) / 2)
    finite = torch.stack([middle.isfinite().all() for middle in middles])
    safe = [torch.where(fine, middle, torch.zeros_like(middle)) for fine, middle in zip(finite, middles, strict=True)]
    bases = eigenbases(safe)
    ends = torch.stack([like[0].new_zeros(()) if b is None else b[0][-1] for b in bases.values])
    good = (finite & (ends <= 1 + noise)).tolist()
    values: list[Factorisation | None] = []
    for index in range(len(pairs)):
        right, left = bases.values[2 * index], bases.values[2 * index + 1]
        if right is None or left is None or not (good[2 * index] and good[2 * index + 1]):
            values.append(None)
            continue
        vectors = [
            torch.linalg.solve_triangular(root.mT, basis[1], upper=True)
            for root, basis in zip(roots[2 * index : 2 * index + 2], (right, left), strict=True)
        ]
        overlaps = torch.outer(left[0].clamp(max=1), right[0].clamp(max=1))
        values.append(
            {
                "left_vectors": vectors[1],
                "right_vectors": vectors[0],
                # 1 is added when they are applied. Below the square root of the rounding error 1 - s_G s_A is noise.
                "eigenvalues": overlaps.clamp(max=1 - noise).neg(),
                "psi_A": psis[2 * index],
                "psi_G": psis[2 * index + 1],
            }
        )
    return values


def apply_chains(
    grads: Sequence[Tensor], factorisations: Sequence[Factorisation], following: Sequence[int | None]
) -> tuple[list[Tensor], Tensor]:
    """P = Ξᵀ Σ⁻¹ Ξ V.

    Args:
        grads: V_i (out_i, in_i) of all layers that take part in the step.
        factorisations: of each; a layer whose factorisation is not `LINKED` is treated as the last of its chain.
        following: the position of each layer's successor among them, None where it has none or that has no gradient.

    Returns:
        P_i in the dtype of V_i, and ⟨P_i, V_i⟩ as one tensor. Only their sum over a chain is a square.
    """
    matrices = [grad.to(f["left"].dtype) for grad, f in zip(grads, factorisations, strict=True)]
    linked = [i for i, j in enumerate(following) if j is not None and LINKED[0] in factorisations[i]]
    single = [i for i in range(len(grads)) if i not in set(linked)]
    inner: list[Tensor] = list(matrices)
    for i in linked:
        f, j = factorisations[i], following[i]
        assert j is not None
        inner[i] = matrices[i] - f["psi_G"] @ (matrices[j] @ f["psi_A"].mT)
    if linked:
        own = [factorisations[i] for i in linked]
        lefts, rights, values = ([f[key] for f in own] for key in LINKED[:3])
        done, _ = ops.eigen_precondition(
            [inner[i] for i in linked], lefts, rights, values, per_layer([1.0] * len(own), values)
        )
        for i, matrix in zip(linked, done, strict=True):
            inner[i] = matrix
    if single:
        own = [factorisations[i] for i in single]
        done, _ = ops.kron_precondition([inner[i] for i in single], [f["left"] for f in own], [f["right"] for f in own])
        for i, matrix in zip(single, done, strict=True):
            inner[i] = matrix
    out = list(inner)
    for i in linked:
        f, j = factorisations[i], following[i]
        assert j is not None
        out[j] = inner[j] - f["psi_G"].mT @ (inner[i] @ f["psi_A"])
    return finish(grads, out)
