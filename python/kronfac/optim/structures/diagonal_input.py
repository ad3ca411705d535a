"""Layers whose input factor is diagonal: embeddings. Memory and time grow with the vocabulary, not with its square."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronfac.linalg.damped import damped_inverses, eigenbases, pi_from_means
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, WithoutRows, finish, per_layer


class DiagonalInputInverse(WithoutRows):
    """P = (G + √λ/π I)⁻¹ V diag(a + π√λ)⁻¹: factored Tikhonov damping, a the diagonal of A."""

    name = "diagonal_input/inverse"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """The inverse of the damped G ("left") and of the damped diagonal of A ("right")."""
        return {"left": (outputs, outputs), "right": (inputs,)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`."""
        G = [pair.G for pair in factors]
        lambdas = per_layer(damping, G)
        pi = pi_from_means(
            torch.stack([pair.A.mean() for pair in factors]), torch.stack([g.diagonal().mean() for g in G])
        )
        roots = lambdas.sqrt()
        inverses = damped_inverses(G, roots / pi)
        values: list[Factorisation | None] = []
        for index, (pair, left) in enumerate(zip(factors, inverses.values, strict=True)):
            right = (pair.A + pi[index] * roots[index]).reciprocal()
            values.append(None if left is None else {"left": left, "right": right})
        return Factorised(values, inverses.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`; `damping` is already inside the inverses."""
        del damping
        pairs = zip(grads, factorisations, strict=True)
        return finish(grads, [f["left"] @ (grad.to(f["left"].dtype) * f["right"]) for grad, f in pairs])


class DiagonalInputEigen(WithoutRows):
    """P = Q_G [(Q_Gᵀ V) ⊘ (λ_G aᵀ + λ)]: exact damping; λ may change at every step."""

    name = "diagonal_input/eigen"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Eigenvectors and eigenvalues of G, and the diagonal of A."""
        return {"left_vectors": (outputs, outputs), "left_values": (outputs,), "diagonal": (inputs,)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`."""
        del damping
        bases = eigenbases([pair.G for pair in factors])
        values: list[Factorisation | None] = []
        for pair, basis in zip(factors, bases.values, strict=True):
            if basis is None:
                values.append(None)
                continue
            # A copy: where averages keep their memory it changes before the inverses do.
            values.append({"left_vectors": basis[1], "left_values": basis[0], "diagonal": pair.A.clone()})
        return Factorised(values, bases.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        lambdas = per_layer(damping, [f["left_values"] for f in factorisations])
        out = []
        for index, (grad, f) in enumerate(zip(grads, factorisations, strict=True)):
            vectors = f["left_vectors"]
            spectrum = torch.outer(f["left_values"], f["diagonal"]) + lambdas[index]
            out.append(vectors @ ((vectors.mT @ grad.to(vectors.dtype)) / spectrum))
        return finish(grads, out)
