"""Second moments of per-example gradients of a layer: EKFAC's eigenvalues, the diagonal of the Fisher matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac import _library as _library  # registers the operators
from kronfac.ops._checks import check, check_device, check_dim, check_dtype, check_floating, check_weight, shape_string
from kronfac.ops._detached import detached, register_fake, wants_graph
from kronfac.ops._nondifferentiable import refuse_gradients
from kronfac.ops.covariance import accumulation_dtype


def second_moment_(
    out: Tensor, g: Tensor, x: Tensor, bias: bool = False, decay: float = 0.0, scale: float = 1.0
) -> None:
    """Replace `out` by decay * out + scale * sum_n (sum_t g_nt [x_nt 1]^T)^2, squares taken elementwise.

    The sum over t is the gradient of example n with respect to the weight of a layer that saw T positions. It is
    formed tile by tile and squared at once: memory does not grow with N * o * d. With projected g and x these are the
    eigenvalues of EKFAC (George et al., arXiv:1806.03884).

    Args:
        out: (o, d), or (o, d + 1) with `bias`; any strides; float64 for float64 inputs, else float32. Not read when
            `decay` is 0.
        g: (N, T, o), gradients with respect to the outputs of a layer; float32, float64, bfloat16 or float16. Any
            size may be 0.
        x: (N, T, d), inputs of the layer; the type of `g`.
        bias: append a one to each x_nt, as its last feature.
        decay: factor of the old value, finite and not negative.
        scale: factor of the new term, finite and not negative.

    Raises:
        RuntimeError: wrong rank, size, dtype or device; a decay or scale that is negative or not finite; an expanded
            `out`; an argument that requires grad while grad mode is on. `out` is then unchanged.
    """
    operator = torch.ops.kronfac.second_moment_.default if wants_graph((out, g, x)) else _DETACHED
    operator(out, g, x, bias, decay, scale)


@register_fake("second_moment_")
def _(out: Tensor, g: Tensor, x: Tensor, bias: bool = False, decay: float = 0.0, scale: float = 1.0) -> None:
    op = "second_moment_"
    check_floating(op, "g", g)
    check_dim(op, "g", g, 3, "(N, T, o)")
    check_floating(op, "x", x)
    check_dim(op, "x", x, 3, "(N, T, d)")
    check_dtype(op, "x", x, g.dtype, "the type of g")
    check(
        x.shape[0] == g.shape[0] and x.shape[1] == g.shape[1],
        lambda: (
            f"kronfac::{op}: x: expected shape ({g.shape[0]}, {g.shape[1]}, d) for g of shape {shape_string(g)}, "
            f"got {shape_string(x)}"
        ),
    )
    rows, columns = g.shape[2], x.shape[2] + int(bias)
    check(
        out.dim() == 2 and out.shape[0] == rows and out.shape[1] == columns,
        lambda: (
            f"kronfac::{op}: out: expected shape ({rows}, {columns}) for g of shape {shape_string(g)} and x of shape "
            f"{shape_string(x)}{' with bias' if bias else ''}, got {shape_string(out)}"
        ),
    )
    check_dtype(op, "out", out, accumulation_dtype(g), "what second moments of this g come out as")
    check_device(op, "x", x, g, "g")
    check_device(op, "out", out, g, "g")
    check_weight(op, "decay", decay)
    check_weight(op, "scale", scale)


refuse_gradients("second_moment_")
_DETACHED = detached("second_moment_")
