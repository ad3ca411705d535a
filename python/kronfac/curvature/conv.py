"""Convolutional layers."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.registry import register_adapter
from kronfac.ops import conv_covariance, conv_covariance_


@register_adapter(nn.Conv2d)
class ConvAdapter(LayerAdapter):
    """`torch.nn.Conv2d` as a linear layer on patches (KFC: Grosse & Martens, arXiv:1602.01407), every position shared.

    All strides, dilations, paddings (also 'same', asymmetric, reflecting, ...) and unbatched inputs. Convolutions
    in groups are not covered yet. Only a mask over examples, of shape (N,), covers a convolution: masked positions
    of a map would still be seen by the patches around them.
    """

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """One group and torch's own way to convolve; see `LayerAdapter.supports`."""
        assert isinstance(module, nn.Conv2d)
        own = type(module)._conv_forward is nn.Conv2d._conv_forward and "_conv_forward" not in vars(module)
        return super().supports(module) and module.groups == 1 and own

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.module)

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Σ over the patches of x (N, C, H, W); see `LayerAdapter.input_statistics`."""
        conv = self._conv
        x = _examples(self._batched(x), mask)
        padding = self._padding()
        if conv.padding_mode != "zeros":
            # functional.pad counts from the last axis
            backwards = [amount for axis in range(len(padding) - 2, -1, -2) for amount in padding[axis : axis + 2]]
            x = functional.pad(x, backwards, mode=conv.padding_mode)
            padding = [0] * len(padding)
        window = (list(conv.kernel_size), list(conv.stride), padding, list(conv.dilation))
        if out is None:
            return conv_covariance(x, *window, bias=self.has_bias)
        conv_covariance_(out, x, *window, bias=self.has_bias, decay=1.0)
        return out

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Σ over examples and positions of g (N, out, H, W); see `LayerAdapter.output_statistics`."""
        g = _examples(self._batched(g), mask)
        ones, zeros = [1] * (g.dim() - 2), [0] * (g.dim() - 2)
        # Patches of one pixel: the rows g without a transposed copy of the maps.
        if out is None:
            return conv_covariance(g, ones, ones, zeros, ones, scale=scale)
        conv_covariance_(out, g, ones, ones, zeros, ones, decay=1.0, scale=scale)
        return out

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """Examples that the mask leaves, times positions of the output map."""
        spatial = len(self._conv.kernel_size)
        batch = shape[0] if len(shape) == spatial + 2 else 1
        if mask is not None and mask.shape == (batch,):
            batch = int(mask.sum())
        return batch * math.prod(shape[-spatial:])

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self._conv.kernel_size) + 2 else x.unsqueeze(0)

    def _padding(self) -> list[int]:
        """Low and high padding, axis by axis."""
        conv = self._conv
        if not isinstance(conv.padding, str):
            return [amount for amount in conv.padding for _ in range(2)]
        if conv.padding == "valid":
            return [0] * (2 * len(conv.kernel_size))
        totals = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [amount for total in totals for amount in (total // 2, total - total // 2)]


def _examples(x: Tensor, mask: Tensor | None) -> Tensor:
    return x[mask] if mask is not None and mask.shape == x.shape[:1] else x
