"""Scale and shift of norm layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature.adapter import LayerAdapter, accumulate
from kronfac.curvature.registry import register_adapter
from kronfac.curvature.sharing import SHARINGS, count, covers, example_rows

WHOLE_BLOCK = 128
"""Up to this many parameters a norm layer has one block for all of them; inverting it costs microseconds."""


class NormAdapter(LayerAdapter):
    """The affine part y = γ x̂ + β of a norm layer, whatever x̂ is.

    Its Fisher block is the second moment of the parameters' gradients (Σ x̂ g, Σ g), summed over the positions of an
    example: the whole block where the layer has at most `WHOLE_BLOCK` parameters, else one 2x2 block per unit. W is
    the column of all parameters, γ before β, or (units, 2, 1). The first dimension of the input is that of the
    examples; for a layer norm the second where only that has as many entries as there are examples.
    """

    block = "dense"
    sharings = SHARINGS  # both are the same here
    keeps_input = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.units = self.weight.numel()
        per_unit = 1 + int(self.has_bias)
        self.in_features = 1
        self.groups = 1 if self.units * per_unit <= WHOLE_BLOCK else self.units
        self.out_features = self.units * per_unit // self.groups

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """1, and the parameters of a block."""
        return 1, self.out_features

    @property
    def parts(self) -> tuple[tuple[int, ...], int]:
        """γ and β lie below each other; see `LayerAdapter.parts`."""
        size = self.units // self.groups
        return (size,) * (1 + int(self.has_bias)), -2

    @property
    def reduces(self) -> bool:
        """Always: the gradients of the parameters are those of whole examples."""
        return True

    @abstractmethod
    def normalised(self, x: Tensor) -> Tensor:
        """x̂ as the layer's forward made it of `x`."""

    def layer_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """Per position the gradients of γ and β, (*, parameters), the units as last axis of `g`."""
        # Norms compute in float32 whatever the type of their input; rounded to that, x̂ would not be theirs.
        g = self.units_last(g).to(self.factor_dtype)
        scaled = g * self.units_last(self.normalised(x.to(self.factor_dtype)))
        if not self.has_bias:
            return scaled
        return torch.stack([scaled, g], -1 if self.groups > 1 else -2).flatten(-2)

    @abstractmethod
    def units_last(self, x: Tensor) -> Tensor:
        """(examples, *positions, units)."""

    def units_last_shape(self, shape: torch.Size) -> torch.Size:
        """Of `units_last` of a tensor of this shape."""
        return self.units_last(torch.empty(shape, device="meta")).shape

    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """One for each example: A is 1 in every block."""
        if out is None:
            out = torch.zeros(self.factor_shapes[0], dtype=self.factor_dtype, device=x.device)
        return out.add_(self.positions(x.shape, mask))

    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Σ over examples of what `layer_gradient` made; see `LayerAdapter.output_statistics`."""
        rows = example_rows(g, self._mask(mask, g.shape), mean=False)
        if self.groups == 1:
            return accumulate(out, rows, False, scale)
        rows = rows.to(self.factor_dtype).view(len(rows), self.groups, self.out_features)
        # Units last, so that the sums over examples are as long as the layer is wide.
        columns = rows.unbind(-1)
        moments = [[(one * other).sum(0) for other in columns] for one in columns]
        blocks = torch.stack([torch.stack(line, -1) for line in moments], -2).mul_(scale)
        return blocks if out is None else out.add_(blocks)

    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """Examples that the mask leaves."""
        shape = self.units_last_shape(shape)
        return count(shape, self._mask(mask, shape), True)

    def _mask(self, mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        """The mask, if it covers examples and positions (shape: units last)."""
        return mask if mask is not None and covers(mask, shape) else None

    def _split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        shape = self.weight.shape
        if self.groups == 1 and len(shape) == 1:
            return matrix.reshape(-1).split_with_sizes(self.parts[0])
        parts = torch.split_with_sizes(matrix, list(self.parts[0]), -2)
        return tuple(part.reshape(shape) for part in parts)

    def _matrix(self, parts: list[Tensor]) -> Tensor:
        if self.groups == 1 and parts[0].dim() == 1:
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(-1)
        columns = [part.reshape(*self._grouped((self.units // self.groups,)), 1) for part in parts]
        return columns[0] if len(columns) == 1 else torch.cat(columns, -2)


@register_adapter(nn.LayerNorm)
class LayerNormAdapter(NormAdapter):
    """`torch.nn.LayerNorm`; a mask over tokens counts as for a Linear."""

    leading_positions = True

    def normalised(self, x: Tensor) -> Tensor:
        """See `NormAdapter.normalised`."""
        norm = cast(nn.LayerNorm, self.module)
        return functional.layer_norm(x, norm.normalized_shape, None, None, norm.eps)

    def units_last(self, x: Tensor) -> Tensor:
        """See `NormAdapter.units_last`."""
        return x.reshape(*x.shape[: x.dim() - self.weight.dim()], self.units)


@register_adapter(nn.RMSNorm)
class RMSNormAdapter(LayerNormAdapter):
    """`torch.nn.RMSNorm`."""

    def normalised(self, x: Tensor) -> Tensor:
        """See `NormAdapter.normalised`."""
        norm = cast(nn.RMSNorm, self.module)
        return functional.rms_norm(x, norm.normalized_shape, None, norm.eps)


class ChannelNormAdapter(NormAdapter):
    """Norms with a scale and a shift per channel, x (N, C, *spatial).

    Only a mask over examples, of shape (N,), covers one.
    """

    def layer_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """Per example the gradients of γ and β, (N, parameters): summed over the positions at once, where they lie.

        Maps are large, and every pass over one of its own would show in the time of a step.
        """
        return self._joined(*self.example_sums(g.to(self.factor_dtype), x.to(self.factor_dtype)))

    def _joined(self, scaled: Tensor, shifted: Tensor) -> Tensor:
        if not self.has_bias:
            return scaled
        return torch.stack([scaled, shifted], -1 if self.groups > 1 else -2).flatten(-2)

    def example_sums(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Σ x̂ g and Σ g over the positions of each example, (N, C) both."""

        def of_examples(gradient: Tensor) -> Tensor:
            return gradient.flatten(2).sum(-1) if gradient.dim() > 2 else gradient

        return of_examples(g * self.normalised(x)), of_examples(g)

    def units_last(self, x: Tensor) -> Tensor:
        """See `NormAdapter.units_last`."""
        return x.movedim(1, -1)

    def _mask(self, mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        return mask if mask is not None and mask.shape == shape[:1] else None


@register_adapter(nn.GroupNorm)
class GroupNormAdapter(ChannelNormAdapter):
    """`torch.nn.GroupNorm`."""

    def normalised(self, x: Tensor) -> Tensor:
        """See `NormAdapter.normalised`."""
        norm = cast(nn.GroupNorm, self.module)
        return functional.group_norm(x, norm.num_groups, None, None, norm.eps)


@register_adapter(nn.BatchNorm1d)
@register_adapter(nn.BatchNorm2d)
@register_adapter(nn.BatchNorm3d)
class BatchNormAdapter(ChannelNormAdapter):
    """`torch.nn.BatchNorm1d`, `2d` and `3d`; the statistics of the batch count as constants."""

    def normalised(self, x: Tensor) -> Tensor:
        """By the batch's moments or the running ones, as the forward did; see `NormAdapter.normalised`."""
        if self._of_batch():
            return functional.batch_norm(x, None, None, None, None, True, 0.0, self._norm.eps)
        return functional.batch_norm(x, *self._running(x.dtype), None, None, False, 0.0, self._norm.eps)

    def example_sums(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `ChannelNormAdapter.example_sums`.

        A group norm in which every map is an example of one group has these very sums as gradients, and torch's CPU
        kernel for them takes Σ x g and Σ g in one pass, without x̂ or another tensor as large as the maps. Their
        difference (Σ x g - mean Σ g) loses digits where a mean is far larger than the deviation, as x itself did when
        it was rounded: at a hundred times, single sums are wrong by up to 3e-4 of their usual size.
        """
        if not self._by_maps(x):
            return super().example_sums(g, x)
        if self._of_batch():
            mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        else:
            mean, variance = self._running(x.dtype)
        return self._map_sums(g, x, mean, (variance + self._norm.eps).rsqrt())

    def kept_by(self, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """The batch's mean and inverse deviation, which the forward kept for its backward."""
        node = output.grad_fn
        # Under hooks on saved tensors a look at them has consequences: checkpointing would run the layers again.
        if not self._of_batch() or node is None or node.name() != "NativeBatchNormBackward0" or _saving_is_hooked():
            return None
        moments: tuple[Tensor, Tensor] = node._saved_result1, node._saved_result2  # type: ignore[attr-defined]
        # Of a bfloat16 norm they are rounded to that.
        return moments if moments[0].dtype == self.factor_dtype else None

    def layer_gradient_with(self, g: Tensor, x: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
        """See `LayerAdapter.layer_gradient_with`."""
        g, x = g.to(self.factor_dtype), x.to(self.factor_dtype)
        if not self._by_maps(x):
            return self.layer_gradient(g, x)
        return self._joined(*self._map_sums(g, x, *kept))

    def _by_maps(self, x: Tensor) -> bool:
        return x.dim() > 2 and x.numel() > 0 and x.is_contiguous() and x.device.type == "cpu"

    def _map_sums(self, g: Tensor, x: Tensor, mean: Tensor, inverse_deviation: Tensor) -> tuple[Tensor, Tensor]:
        examples, channels, positions = x.flatten(2).shape
        shape = 1, examples * channels, positions
        mean, inverse_deviation = (
            moment.expand(examples, channels).reshape(1, -1) for moment in (mean, inverse_deviation)
        )
        ones = mean.new_ones(shape[1])  # the weights, of which these gradients do not depend
        _, scaled, shifted = torch.ops.aten.native_group_norm_backward.default(
            g.reshape(shape), x.view(shape), mean, inverse_deviation, ones, *shape, shape[1], [False, True, True]
        )
        return scaled.view(examples, channels), shifted.view(examples, channels)

    @property
    def _norm(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self.module)

    def _of_batch(self) -> bool:
        return self._norm.training or self._norm.running_mean is None or self._norm.running_var is None

    def _running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self._norm.running_mean).to(dtype), cast(Tensor, self._norm.running_var).to(dtype)


def _saving_is_hooked() -> bool:
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return look is None or look(False) is not None
