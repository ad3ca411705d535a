"""Transposed convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature.conv import ConvAdapter
from kronfac.curvature.registry import register_adapter

Transposed: TypeAlias = "nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d"


@register_adapter(nn.ConvTranspose1d)
@register_adapter(nn.ConvTranspose2d)
@register_adapter(nn.ConvTranspose3d)
class ConvTransposeAdapter(ConvAdapter):
    """Transposed convolutions as the equivalent convolution, of stride 1, on the zero-stuffed input.

    `torch.nn.ConvTranspose1d`, `2d` and `3d` with all strides, paddings, output paddings (`output_size` too), dilations
    and groups. Features are ordered as in the patches of that map: by input channel, then kernel offset, the kernel
    being mirrored.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        weight = self.weight  # (in, out / groups, *kernel)
        self.out_features = weight.shape[1]
        self.in_features = weight.shape[0] // self.groups * weight[0, 0].numel()

    def layer_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The zero-stuffed and padded map that the equivalent convolution without padding sees."""
        conv = cast(Transposed, self.module)
        x = super().layer_input(args, kwargs)
        axes = len(conv.kernel_size)
        if x.is_nested:
            return x
        extra = conv.output_padding
        output_size = args[1] if len(args) > 1 else kwargs.get("output_size")
        if output_size is not None:
            options = (conv.stride, conv.padding, conv.kernel_size, axes, conv.dilation)
            extra = tuple(conv._output_padding(x, output_size, *options))  # type: ignore[arg-type]
        batch = x.detach() if x.dim() == axes + 2 else x.detach().unsqueeze(0)
        sizes = [(size - 1) * stride + 1 for size, stride in zip(batch.shape[2:], conv.stride, strict=True)]
        at = stuffed = batch.new_zeros(*batch.shape[:2], *sizes)
        for axis, stride in enumerate(conv.stride, 2):
            at = at[(slice(None),) * axis + (slice(None, None, stride),)]
        at.copy_(batch)
        sides = []
        for kernel, gap, padding, more in zip(
            conv.kernel_size, conv.dilation, cast("tuple[int, ...]", conv.padding), extra, strict=True
        ):
            reach = gap * (kernel - 1) - padding  # negative where padding cuts the map
            sides.append((reach, reach + more))
        return functional.pad(stuffed, [side for pair in reversed(sides) for side in pair])

    def _map(self, x: Tensor) -> tuple[Tensor, list[int], list[int]]:
        axes = x.dim() - 2
        return x, [1] * axes, [0] * (2 * axes)

    def _split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = self.weight
        kernel = weight.shape[2:]
        blocks = matrix[..., : self.in_features].reshape(self.groups, self.out_features, -1, *kernel)
        mirrored = blocks.flip(self._spatial(3)).transpose(1, 2).reshape(weight.shape)
        return (mirrored, matrix[..., -1].reshape(-1)) if self.has_bias else (mirrored,)

    def _matrix(self, parts: list[Tensor]) -> Tensor:
        weight = parts[0]
        blocks = weight.reshape(self.groups, -1, *weight.shape[1:]).flip(self._spatial(3)).transpose(1, 2)
        return super()._matrix([blocks, *parts[1:]])

    def _spatial(self, first: int) -> list[int]:
        return list(range(first, first + len(self._conv.kernel_size)))
