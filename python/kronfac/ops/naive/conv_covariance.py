"""Plain torch reference of `kronfac::conv_covariance` and `kronfac::conv_covariance_`: the truth for their tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronfac.ops.naive.covariance import covariance


def patches(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The patches of x (N, C, *spatial) as rows (N * positions, C * offsets), ordered as by `nn.functional.unfold`."""
    axes = x.dim() - 2
    sides = list(padding) if len(padding) == 2 * axes else [side for side in padding for _ in range(2)]
    # torch's pad wants the last axis first.
    x = torch.nn.functional.pad(x, [side for axis in reversed(range(axes)) for side in sides[2 * axis : 2 * axis + 2]])
    for axis in range(axes):
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    order = [0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)]
    x = x.permute(order)
    positions, features = x.shape[: 1 + axes].numel(), x.shape[1 + axes :].numel()
    return x.reshape(positions, features)


def conv_covariance(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Return scale * [P 1]^T [P 1] for the patches P of x; (groups, d, d) for several groups of channels."""
    parts = [
        covariance(patches(part, kernel_size, stride, padding, dilation), bias, scale)
        for part in x.tensor_split(groups, dim=1)
    ]
    return parts[0] if groups == 1 else torch.stack(parts)


def conv_covariance_(
    out: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Replace `out` by decay * out + what `conv_covariance` returns; `out` is not read when decay is 0."""
    update = conv_covariance(x, kernel_size, stride, padding, dilation, groups, bias, scale)
    out.copy_(update if decay == 0 else decay * out + update)
