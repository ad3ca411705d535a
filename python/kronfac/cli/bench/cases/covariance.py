"""Cases of `covariance` and `conv_covariance`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kronfac import ops
from kronfac.cli.bench.case import OURS, Case, Contest

# (rows, features): first a batch of unfolded patches, then layers of the autoencoder and wide networks, small layers,
# tall and flat extremes.
QUICK_SHAPES = ((16, 8), (500, 250))
SHAPES = (
    (8192, 576),
    (32768, 576),
    (2048, 1024),
    (16, 8),
    (64, 64),
    (128, 10),
    (128, 1024),
    (500, 30),
    (500, 250),
    (500, 784),
    (500, 1000),
    (1024, 128),
    (2048, 256),
    (8192, 16),
    (8192, 144),
    (65536, 64),
    (131072, 27),
    (1000000, 64),
    (256, 4096),
)

# name, (N, C, H, W), kernel, stride, padding
CONV_SHAPES = (
    ("3x3", (128, 16, 32, 32), 3, 1, 1),
    ("3x3", (64, 64, 32, 32), 3, 1, 1),
    ("3x3", (32, 128, 16, 16), 3, 1, 1),
    ("3x3", (128, 64, 8, 8), 3, 1, 1),
    ("7x7/2", (32, 3, 224, 224), 7, 2, 3),
    ("3x3", (128, 3, 32, 32), 3, 1, 1),
    ("3x3/2", (128, 32, 16, 16), 3, 2, 1),
    ("1x1/2", (128, 32, 16, 16), 1, 2, 0),
    ("3x3", (8, 16, 8, 8), 3, 1, 1),
)
QUICK_CONV = (8, 16, 8, 8)


def cases() -> Iterator[Case]:
    """All cases of this module."""
    for dtype in (torch.float32, torch.bfloat16):
        for m, d in SHAPES if dtype == torch.float32 else SHAPES[:3]:
            yield Case(
                op="covariance",
                name=f"{m}x{d}" + (" bfloat16" if dtype == torch.bfloat16 else ""),
                prepare=partial(_covariance, m, d, dtype),
                work=float(m) * d * (d + 1),  # one triangle: the other is a copy
                quick=(m, d) in QUICK_SHAPES,
            )
    for name, shape, kernel, stride, padding in CONV_SHAPES:
        n, channels, height, width = shape
        positions = 1
        for extent in (height, width):
            positions *= (extent + 2 * padding - kernel) // stride + 1
        d = channels * kernel * kernel
        yield Case(
            op="conv_covariance",
            name=f"{name} {'x'.join(map(str, shape))}",
            prepare=partial(_conv_covariance, shape, kernel, stride, padding),
            work=float(n) * positions * d * (d + 1),  # of the product of the patches that is never formed
            quick=shape == QUICK_CONV,
        )


def _covariance(m: int, d: int, dtype: torch.dtype) -> Contest:
    x = torch.randn(m, d).to(dtype)
    sides = {OURS: lambda: ops.covariance(x), "torch": lambda: x.T @ x}
    if dtype == torch.float32 and x.is_cpu:
        array = x.numpy()
        sides["numpy"] = lambda: torch.from_numpy(array.T @ array)
    # torch returns bfloat16, so its error is no measure for sums in float32.
    return Contest(sides, partial(_scaled_error, _gram([x])), None if dtype == torch.float32 else 1e-4)


def _conv_covariance(shape: tuple[int, int, int, int], kernel: int, stride: int, padding: int) -> Contest:
    x = torch.randn(shape)
    window = ((kernel, kernel), (stride, stride), (padding, padding), (1, 1))

    def unfolded(part: Tensor) -> Tensor:
        columns = functional.unfold(part, kernel, padding=padding, stride=stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])

    def rival() -> Tensor:
        patches = unfolded(x)
        return patches.T @ patches

    truth = _gram(unfolded(part) for part in torch.split(x, 8))
    return Contest({OURS: lambda: ops.conv_covariance(x, *window), "torch": rival}, partial(_scaled_error, truth))


def _gram(parts: Iterator[Tensor] | list[Tensor]) -> Tensor:
    """The sum of part^T part in float64, a few thousand rows at a time."""
    total: Tensor | float = 0.0
    for part in parts:
        for rows in torch.split(part, 16384):
            exact = rows.double()
            total = exact.T @ exact + total
    assert isinstance(total, Tensor)
    return total


def _scaled_error(truth: Tensor, result: Tensor) -> float:
    """Largest |e_ij| / sqrt(a_ii a_jj): a large entry elsewhere hides nothing."""
    scale = truth.diagonal().sqrt()
    return float(((result.double() - truth).abs() / (scale[:, None] * scale)).max())
