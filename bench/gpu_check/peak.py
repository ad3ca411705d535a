"""What this GPU does at most, by torch's own largest products and copies: the denominators of "share of the peak"."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.gpu_check.timing import Stopwatch

SIDE = 8192
COPIED = 4 << 30
ROUNDS = 7


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let torch multiply float32 matrices in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class Peaks:
    """Rates, medians.

    Attributes:
        bf16, tf32, float32, float64: operations per second of a product of random matrices of order 8192.
        memory: bytes per second, read and written, of copying one large array to another.
    """

    bf16: float
    tf32: float
    float32: float
    float64: float
    memory: float


def measure_peaks(watch: Stopwatch) -> Peaks:
    """Measure all of them, seconds altogether."""

    def rate(dtype: torch.dtype, allowed: bool) -> float:
        with tf32(allowed):
            a, b = (torch.randn(SIDE, SIDE, device="cuda").to(dtype) for _ in range(2))
            torch.mm(a, b)
            times = [watch.seconds(lambda: torch.mm(a, b)) for _ in range(ROUNDS)]
        return 2.0 * SIDE**3 / statistics.median(times)

    size = min(COPIED, torch.cuda.mem_get_info()[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    copies = [watch.seconds(lambda: target.copy_(source)) for _ in range(ROUNDS)]
    return Peaks(
        bf16=rate(torch.bfloat16, False),
        tf32=rate(torch.float32, True),
        float32=rate(torch.float32, False),
        float64=rate(torch.float64, False),
        memory=2.0 * size / statistics.median(copies),
    )
