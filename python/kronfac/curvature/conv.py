"""Convolutional layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature.adapter import LayerAdapter, accumulate
from kronfac.curvature.masks import chosen, number
from kronfac.curvature.registry import register_adapter
from kronfac.curvature.sharing import SHARINGS
from kronfac.ops import conv_covariance, conv_covariance_

Convolution: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.Conv3d"


@register_adapter(nn.Conv1d)
@register_adapter(nn.Conv2d)
@register_adapter(nn.Conv3d)
class ConvAdapter(LayerAdapter):
    """Convolutions as linear layers on patches (KFC: Grosse & Martens, arXiv:1602.01407), every position shared.

    `torch.nn.Conv1d`, `Conv2d` and `Conv3d` with all strides, dilations and paddings (also 'same', asymmetric,
    reflecting, ...), in groups (one pair of factors per group, depthwise included), and unbatched inputs. Only a mask
    over examples, of shape (N,), covers a convolution: masked positions of a map would still be seen by the patches
    around them.
    """

    sharings = SHARINGS
    has_pairs = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.groups = self._conv.groups
        self.out_features //= self.groups
        self.input_offsets = math.prod(self._conv.kernel_size)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Torch's own way to convolve; see `LayerAdapter.supports`."""
        for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            if isinstance(module, kind) and type(module)._conv_forward is not kind._conv_forward:
                return False
        return "_conv_forward" not in vars(module) and super().supports(module)

    @property
    def _conv(self) -> Convolution:
        return cast(Convolution, self.module)

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Σ over the patches of x (N, C, *spatial); see `LayerAdapter.input_statistics`."""
        return self.patch_statistics(out, *self._map(self._examples(x, mask)))

    def input_rows(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """The patches of a few examples at a time; see `LayerAdapter.input_rows`."""
        x, stride, padding = self._map(self._examples(x, mask))
        kernel, dilation = list(self._conv.kernel_size), list(self._conv.dilation)
        if self.reduces:
            yield mean_patches(x, kernel, stride, padding, dilation)
            return
        axes = x.dim() - 2
        order = (0, *range(2 + axes, 2 + 2 * axes), *range(1, 2 + axes))  # positions before what a patch is made of
        for example in torch.split(x, 1):
            patches = _patches(example.to(self.factor_dtype), stride, padding, kernel, dilation)
            yield patches.permute(order).reshape(-1, math.prod(patches.shape[1 : 2 + axes]))

    def _map(self, x: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """The map (N, C, *spatial) whose patches the layer sees, their stride, and the zeros around the map."""
        conv = self._conv
        padding = self._padding()
        if conv.padding_mode != "zeros":
            x = functional.pad(x, _backwards(padding), mode=conv.padding_mode)
            padding = [0] * len(padding)
        return x, list(conv.stride), padding

    def patch_statistics(self, out: Tensor | None, x: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        """Σ over the patches of a map, or over the mean patch of each example.

        Args:
            out: as in `input_statistics`.
            x: (N, C, *spatial).
            stride: entries for each axis.
            padding: zeros, low and high entries for each axis.
        """
        kernel_size, dilation = list(self._conv.kernel_size), list(self._conv.dilation)
        if self.reduces:
            patches = mean_patches(x, kernel_size, stride, padding, dilation)
            return self._accumulate(out, patches, self.has_bias)
        window = (kernel_size, stride, padding, dilation, self.groups, self.has_bias)
        if out is None:
            return conv_covariance(x, *window)
        conv_covariance_(out, x, *window, decay=1.0)
        return out

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Σ over examples and positions of g (N, out, *spatial); see `LayerAdapter.output_statistics`."""
        g = self._examples(g, mask)
        if self.reduces:
            dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
            return self._accumulate(out, g.sum(list(range(2, g.dim())), dtype=dtype), False, scale)
        ones, zeros = [1] * (g.dim() - 2), [0] * (g.dim() - 2)
        # Patches of one pixel: the rows g without a transposed copy of the maps.
        if out is None:
            return conv_covariance(g, ones, ones, zeros, ones, self.groups, scale=scale)
        conv_covariance_(out, g, ones, ones, zeros, ones, self.groups, decay=1.0, scale=scale)
        return out

    def pairs(self, x: Tensor, g: Tensor, mask: Tensor | None, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `LayerAdapter.pairs`: patches and the gradients of their outputs."""
        conv, groups = self._conv, self.groups
        x, g = self._examples(x, mask), self._examples(g, mask)
        positions = g.shape[2:].numel()
        examples = max(rows // max(positions, 1), 1)
        for some, gradient in zip(torch.split(x, examples), torch.split(g, examples), strict=True):
            view = _patches(*self._map(some), list(conv.kernel_size), list(conv.dilation))
            features = view.reshape(len(some), groups, self.in_features, positions).mT
            outputs = gradient.reshape(len(some), groups, self.out_features, positions).mT
            yield (features, outputs) if groups > 1 else (features.squeeze(1), outputs.squeeze(1))

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """Examples that the mask leaves, times positions of the output map."""
        spatial = len(self._conv.kernel_size)
        batch = shape[0] if len(shape) == spatial + 2 else 1
        if mask is not None and mask.shape == (batch,):
            batch = number(mask)
        return batch if self.reduces else batch * math.prod(shape[-spatial:])

    def _accumulate(self, out: Tensor | None, features: Tensor, bias: bool, scale: float = 1.0) -> Tensor:
        """Σ over the rows of features (N, groups·size), group by group."""
        if self.groups == 1:
            return accumulate(out, features, bias, scale)
        # As maps of one pixel the groups are one call.
        one, zero = [1], [0]
        if out is None:
            return conv_covariance(features.unsqueeze(-1), one, one, zero, one, self.groups, bias, scale)
        conv_covariance_(out, features.unsqueeze(-1), one, one, zero, one, self.groups, bias, 1.0, scale)
        return out

    def _examples(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.dim() == len(self._conv.kernel_size) + 1:
            x = x.unsqueeze(0)
        return chosen(x, mask) if mask is not None and mask.shape == x.shape[:1] else x

    def _padding(self) -> list[int]:
        """Low and high padding, axis by axis."""
        conv = self._conv
        if not isinstance(conv.padding, str):
            return [amount for amount in conv.padding for _ in range(2)]
        if conv.padding == "valid":
            return [0] * (2 * len(conv.kernel_size))
        totals = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [amount for total in totals for amount in (total // 2, total - total // 2)]


def mean_patches(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The mean patch of each example, (N, channels·offsets) in the order of a convolution's weight.

    Args:
        x: (N, C, *spatial).
        kernel_size: entries for each spatial axis, like `stride` and `dilation`.
        stride: steps between patches.
        padding: zeros, low and high entries for each axis.
        dilation: distance of the entries of a patch.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    patches = _patches(x, stride, padding, kernel_size, dilation)
    axes = len(kernel_size)
    return patches.mean(list(range(2 + axes, 2 + 2 * axes))).reshape(len(x), math.prod(patches.shape[1 : 2 + axes]))


def _patches(x: Tensor, stride: list[int], padding: list[int], kernel_size: list[int], dilation: list[int]) -> Tensor:
    """A view (N, C, *kernel offsets, *positions) of the padded map (N, C, *spatial)."""
    x = functional.pad(x, _backwards(padding)).contiguous()
    spatial, steps = x.shape[2:], x.stride()
    positions = [
        (size - gap * (kernel - 1) - 1) // step + 1
        for size, kernel, step, gap in zip(spatial, kernel_size, stride, dilation, strict=True)
    ]
    offset_strides = [gap * s for gap, s in zip(dilation, steps[2:], strict=True)]
    position_strides = [step * s for step, s in zip(stride, steps[2:], strict=True)]
    return x.as_strided((*x.shape[:2], *kernel_size, *positions), (*steps[:2], *offset_strides, *position_strides))


def _backwards(padding: list[int]) -> list[int]:
    """As `functional.pad` counts: from the last axis."""
    return [amount for axis in range(len(padding) - 2, -1, -2) for amount in padding[axis : axis + 2]]
