"""Fully connected layers that store their weight the other way round."""

from __future__ import annotations

from torch import Tensor, nn

from kronfac.curvature.linear import LinearAdapter
from kronfac.curvature.registry import register_adapter


@register_adapter("transformers.pytorch_utils.Conv1D")
class TransposedLinearAdapter(LinearAdapter):
    """x @ weight + bias with a weight (in, out): ``Conv1D`` of Hugging Face transformers, which GPT-2 is made of.

    Statistics are those of `torch.nn.Linear`; only the gradient matrix is turned round.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.in_features, self.out_features = self.weight.shape

    def _matrix(self, parts: list[Tensor]) -> Tensor:
        return super()._matrix([parts[0].mT, *parts[1:]])

    def _split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = matrix[..., : self.in_features].mT.contiguous()
        return (weight, matrix[..., -1]) if self.has_bias else (weight,)
