"""Plain torch reference of `kronfac::covariance` and `kronfac::covariance_`: the truth for their tests."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(x: Tensor, bias: bool = False, scale: float = 1.0) -> Tensor:
    """Return scale * [x 1]^T [x 1] in the type of x, and in float32 for bfloat16 and float16."""
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    if bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return scale * (x.mT @ x)


def covariance_(out: Tensor, x: Tensor, bias: bool = False, decay: float = 0.0, scale: float = 1.0) -> None:
    """Replace `out` by decay * out + scale * [x 1]^T [x 1]; `out` is not read when decay is 0."""
    update = covariance(x, bias, scale)
    out.copy_(update if decay == 0 else decay * out + update)
