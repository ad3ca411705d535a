"""Random probe vectors, drawn from generators of their own."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

DISTRIBUTIONS = ("rademacher", "gaussian")


def make_generator(seed: int, caller: str) -> torch.Generator:
    """A generator on the CPU, so that a seed gives the same probes on every device; no global stream is touched.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{caller}: seed: expected an integer, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{caller}: seed: expected an integer in [0, 2**63), got {seed}")
    return torch.Generator(device="cpu").manual_seed(seed)


def draw_probes(
    size: int,
    count: int,
    distribution: str,
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw `count` probes z with E[z zᵀ] = I.

    Args:
        size: n, the length of a probe.
        count: number of probes.
        distribution: "rademacher" (entries ±1, the least variance for a trace) or "gaussian".
        generator: source of randomness, on the CPU.
        dtype: of the result.
        device: of the result.

    Returns:
        Probes as columns (n, count). They depend on the generator alone, not on how they are grouped into calls:
        drawing 3 and then 5 gives the same eight probes as drawing 8.
    """
    # One draw per probe: a single (count, size) draw would consume the stream differently in vectorised blocks.
    if distribution == "rademacher":
        rows = [torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) for _ in range(count)]
        probes = torch.stack(rows).to(device=device, dtype=dtype).mul_(2).sub_(1)
    elif distribution == "gaussian":
        rows = [torch.randn(size, generator=generator, dtype=dtype) for _ in range(count)]
        probes = torch.stack(rows).to(device)
    else:
        raise ValueError(f"distribution: expected one of {DISTRIBUTIONS}, got {distribution!r}")
    return probes.mT


def standard_error(samples: list[float]) -> float:
    """Standard error of the mean of independent samples, at least two."""
    return float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
