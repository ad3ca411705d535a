"""Mini-blocks: a Kronecker product for each slice of a layer's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronfac.curvature import ExtraStatistic, LayerAdapter
from kronfac.curvature.slices import SliceMoments, slices_of, split
from kronfac.optim.structures.base import Averages, Factorisation, Factorised, Structure, WithoutRows

MOMENTS = "moments"
"""Name of the running average of U and V of all slices."""


class MiniBlock(WithoutRows):
    """F_s ≈ U_s ⊗ V_s / tr U_s for each slice s of output rows, the tensor-normal form.

    U_s = E[M_s M_sᵀ] and V_s = E[M_sᵀ M_s] are second moments of the slice's per-example gradient M_s (Ren & Goldfarb,
    arXiv:2106.02925; blocks by outputs: Bahamou, Goldfarb & Ren, arXiv:2202.04124). Where F_s is a Kronecker product
    the form is exact. How many slices there are is `kronfac.curvature.slices.slices_of`.

    Args:
        inner: how one Kronecker product is inverted and applied.
    """

    name = "mini_block"
    needs_factors = False

    def __init__(self, inner: Structure) -> None:
        self.inner = inner

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Those of one slice, the slices in front."""
        slices = slices_of(outputs, inputs)
        return {key: (slices, *shape) for key, shape in self.inner.shapes(outputs // slices, inputs).items()}

    def statistics(self, adapter: LayerAdapter) -> Mapping[str, ExtraStatistic]:
        """U and V of all slices."""
        return {MOMENTS: SliceMoments(adapter)}

    def factorise(self, factors: Sequence[Averages], damping: Sequence[float]) -> Factorised:
        """See `Structure.factorise`. A layer counts as inverted when all of its slices are."""
        blocks: list[Averages] = []
        fronts: list[torch.Size] = []
        for some in factors:
            moments = some.extra[MOMENTS]
            inputs, outputs = some.A.shape[-1], some.G.shape[-1]
            U, V = split(moments, outputs // moments.shape[-2], inputs)
            fronts.append(U.shape[:-2])
            # The scalar of the product is shared by both sides; where everything is 0 it stays so.
            size = U.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(U.dtype).tiny).rsqrt()
            U, V = (U * size[..., None, None]).flatten(0, -3), (V * size[..., None, None]).flatten(0, -3)
            blocks += (Averages(A, G, {}) for A, G in zip(V.unbind(), U.unbind(), strict=True))
        counts = [front.numel() for front in fronts]
        done = self.inner.factorise(
            blocks, [value for value, count in zip(damping, counts, strict=True) for _ in range(count)]
        )
        values: list[Factorisation | None] = []
        start = 0
        for front, count in zip(fronts, counts, strict=True):
            whole = [value for value in done.values[start : start + count] if value is not None]
            start += count
            if len(whole) < count:
                values.append(None)
                continue
            stacks = {key: torch.stack([one[key] for one in whole]) for key in whole[0]}
            values.append({key: stack.view(*front, *stack.shape[1:]) for key, stack in stacks.items()})
        return Factorised(values, done.retried)

    def apply(
        self, grads: Sequence[Tensor], factorisations: Sequence[Factorisation], damping: Sequence[float]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Structure.apply`."""
        matrices: list[Tensor] = []
        blocks: list[Factorisation] = []
        dampings: list[float] = []
        counts: list[int] = []
        for grad, factorisation, value in zip(grads, factorisations, damping, strict=True):
            own = {key: tensor for key, tensor in factorisation.items() if key != MOMENTS}
            front = next(iter(own.values())).shape[: grad.dim() - 1]  # ([groups,] slices)
            parts = {key: tensor.flatten(0, len(front) - 1).unbind() for key, tensor in own.items()}
            counts.append(front.numel())
            matrices += grad.reshape(front.numel(), -1, grad.shape[-1]).unbind()
            blocks += ({key: tensors[index] for key, tensors in parts.items()} for index in range(counts[-1]))
            dampings += [value] * counts[-1]
        out, dots = self.inner.apply(matrices, blocks, dampings)
        results: list[Tensor] = []
        start = 0
        for grad, count in zip(grads, counts, strict=True):
            results.append(torch.cat(out[start : start + count]).view(grad.shape))
            start += count
        return results, torch.stack([part.sum() for part in torch.split_with_sizes(dots, counts)])
