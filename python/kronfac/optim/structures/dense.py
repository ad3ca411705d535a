"""Layers whose Fisher block is small enough to be kept whole: norms, unit by unit or all parameters together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kronfac.curvature import KroneckerFactors
from kronfac.linalg.damped import damped_inverses, eigenbases
from kronfac.optim.structures.base import Factorisation, Factorised, WithoutRows, finish, per_layer

_T = TypeVar("_T")


class DenseInverse(WithoutRows):
    """P = (F + λI)⁻¹ V, F the block (out, out) or (groups, out, out) that a layer's G holds, its A being 1."""

    name = "dense/inverse"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """The inverse of the damped block."""
        del inputs
        return {"inverse": (outputs, outputs)}

    def factorise(self, factors: Sequence[KroneckerFactors], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`."""
        blocks, counts = _blocks(factors)
        lambdas = torch.repeat_interleave(per_layer(damping, blocks), torch.tensor(counts, device=blocks[0].device))
        inverses = damped_inverses(blocks, lambdas)
        values: list[Factorisation | None] = []
        for pair, some in zip(factors, _split(inverses.values, counts), strict=True):
            whole = [inverse for inverse in some if inverse is not None]
            good = len(whole) == len(some)
            values.append({"inverse": torch.stack(whole).view_as(pair.G)} if good else None)
        return Factorised(values, inverses.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`; `damping` is already inside the inverses."""
        del damping
        out = [f["inverse"] @ grad.to(f["inverse"].dtype) for grad, f in zip(grads, factorisations, strict=True)]
        return finish(grads, out)


class DenseEigen(WithoutRows):
    """P = Q [(Qᵀ V) ⊘ (λ_F + λ)]: exact damping in the block's eigenbasis; λ may change at every step."""

    name = "dense/eigen"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Eigenvectors and eigenvalues of the block."""
        del inputs
        return {"vectors": (outputs, outputs), "values": (outputs,)}

    def factorise(self, factors: Sequence[KroneckerFactors], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`."""
        del damping
        blocks, counts = _blocks(factors)
        bases = eigenbases(blocks)
        values: list[Factorisation | None] = []
        for pair, some in zip(factors, _split(bases.values, counts), strict=True):
            whole = [basis for basis in some if basis is not None]
            if len(whole) < len(some):
                values.append(None)
                continue
            vectors = torch.stack([basis[1] for basis in whole]).view_as(pair.G)
            spectra = torch.stack([basis[0] for basis in whole]).view(pair.G.shape[:-1])
            values.append({"vectors": vectors, "values": spectra})
        return Factorised(values, bases.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        lambdas = per_layer(damping, [f["values"] for f in factorisations])
        out = []
        for index, (grad, f) in enumerate(zip(grads, factorisations, strict=True)):
            vectors = f["vectors"]
            rotated = vectors.mT @ grad.to(vectors.dtype)
            out.append(vectors @ (rotated / (f["values"].unsqueeze(-1) + lambdas[index])))
        return finish(grads, out)


def _blocks(factors: Sequence[KroneckerFactors]) -> tuple[list[Tensor], list[int]]:
    """All blocks of all layers, and how many each layer has."""
    blocks: list[Tensor] = []
    counts = []
    for pair in factors:
        stack = pair.G.reshape(-1, *pair.G.shape[-2:])
        counts.append(len(stack))
        blocks += stack.unbind()
    return blocks, counts


def _split(values: Sequence[_T], counts: Sequence[int]) -> list[Sequence[_T]]:
    parts, start = [], 0
    for count in counts:
        parts.append(values[start : start + count])
        start += count
    return parts
