"""Layers whose Fisher block is small enough to be kept whole: norms, unit by unit or all parameters together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kronfac.linalg.damped import damped_inverses, eigenbases
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, WithoutRows, finish, per_layer


class DenseInverse(WithoutRows):
    """P = (F + λI)⁻¹ V, F the block (out, out) or (groups, out, out) that a layer's G holds, its A being 1."""

    name = "dense/inverse"

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """The inverse of the damped block."""
        del inputs
        return {"inverse": (outputs, outputs)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`."""
        lambdas = per_layer(damping, [pair.G for pair in factors])

        def at_once(index: int) -> tuple[Factorisation, Tensor]:
            G = factors[index].G
            lower, info = torch.linalg.cholesky_ex(
                G + lambdas[index] * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
            )
            inverse = torch.cholesky_inverse(lower)
            return {"inverse": inverse}, (info == 0).all() & inverse.isfinite().all()

        def one_by_one(index: int) -> tuple[Factorisation | None, int]:
            blocks = _blocks(factors[index])
            done = damped_inverses(blocks, lambdas[index].expand(len(blocks)))
            whole = [inverse for inverse in done.values if inverse is not None]
            good = len(whole) == len(blocks)
            shape = factors[index].G.shape
            return {"inverse": torch.stack(whole).view(shape)} if good else None, done.retried

        return _factorise(len(factors), at_once, one_by_one)

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

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`."""
        del damping

        def at_once(index: int) -> tuple[Factorisation, Tensor]:
            G = factors[index].G
            try:
                values, vectors = torch.linalg.eigh(G)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                return {}, torch.zeros((), dtype=torch.bool, device=G.device)
            # As in `eigenbases`: below the rounding error of the largest, eigenvalues are noise of either sign.
            values = torch.maximum(values, values[..., -1:] * torch.finfo(G.dtype).eps)
            return {"vectors": vectors, "values": values}, values.isfinite().all() & vectors.isfinite().all()

        def one_by_one(index: int) -> tuple[Factorisation | None, int]:
            G = factors[index].G
            done = eigenbases(_blocks(factors[index]))
            whole = [basis for basis in done.values if basis is not None]
            if len(whole) < len(done.values):
                return None, done.retried
            vectors = torch.stack([basis[1] for basis in whole]).view(G.shape)
            values = torch.stack([basis[0] for basis in whole]).view(G.shape[:-1])
            return {"vectors": vectors, "values": values}, done.retried

        return _factorise(len(factors), at_once, one_by_one)

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


def _factorise(
    count: int,
    at_once: Callable[[int], tuple[Factorisation, Tensor]],
    one_by_one: Callable[[int], tuple[Factorisation | None, int]],
) -> Factorised:
    """Factorise the stack of a layer's blocks in one call, and block by block, with retries, where one resists.

    A norm of 768 units is 768 blocks of 2x2: a list of them costs fifty times what a stack does.
    """
    values: list[Factorisation | None] = []
    flags = []
    for index in range(count):
        value, good = at_once(index)
        values.append(value)
        flags.append(good)
    retried = 0
    for index, good in enumerate(torch.stack(flags).tolist()):  # one wait for the device
        if not good:
            values[index], more = one_by_one(index)
            retried += more
    return Factorised(values, retried)


def _blocks(pair: Averages) -> list[Tensor]:
    return list(pair.G.reshape(-1, *pair.G.shape[-2:]).unbind())
