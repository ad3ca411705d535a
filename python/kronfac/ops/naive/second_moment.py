"""Plain torch reference of `kronfac::second_moment_`: the truth for its tests."""

from __future__ import annotations

import torch
from torch import Tensor


def second_moment_(
    out: Tensor, g: Tensor, x: Tensor, bias: bool = False, decay: float = 0.0, scale: float = 1.0
) -> None:
    """Replace `out` by decay * out + scale * sum_n (sum_t g_nt [x_nt 1]^T)^2; `out` is not read when decay is 0."""
    g, x = g.to(out.dtype), x.to(out.dtype)
    if bias:
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
    update = scale * (g.mT @ x).square().sum(dim=0)
    out.copy_(update if decay == 0 else decay * out + update)
