"""The operator tests on another device: `KRONFAC_DEVICE=cuda pytest tests/ops`.

Tests make their tensors with torch's factory functions and name no device, so that torch's default device decides where
everything lies. Only what they compare with stays behind: the references of `kronfac.ops.naive` get copies on the CPU,
and what they return or change is brought back. Tolerances are the same everywhere; TF32 is off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kronfac.ops import naive

DEVICE = torch.device(os.environ.get("KRONFAC_DEVICE") or "cpu")


def use_device() -> None:
    """Let all tests that are imported from now on work on `DEVICE`; on the CPU nothing changes."""
    if DEVICE.type == "cpu":
        return
    if DEVICE.type != "cuda" or not torch.cuda.is_available():
        raise pytest.UsageError(f"KRONFAC_DEVICE={DEVICE}: expected cpu, or cuda where torch sees a GPU")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("kronfac::covariance", "CUDA"):
        raise pytest.UsageError(f"KRONFAC_DEVICE={DEVICE}: the CUDA operators are not loaded; see `kronfac info`")
    torch.set_default_device(DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in naive.__all__:
        setattr(naive, name, on_the_cpu(getattr(naive, name)))


def on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on CPU copies of its tensors; results and changes go back to where the arguments are."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor, int]] = []

        def moved(tensor: Tensor) -> Tensor:
            copy = tensor.cpu()
            pairs.append((tensor, copy, copy._version))
            return copy

        own_args, own_kwargs = tree_map_only(Tensor, moved, (args, kwargs))
        with torch.device("cpu"):
            result = function(*own_args, **own_kwargs)
        for tensor, copy, version in pairs:
            if copy is not tensor and copy._version != version:
                tensor.copy_(copy)
        home = pairs[0][0].device if pairs else DEVICE
        return tree_map_only(Tensor, lambda tensor: tensor.to(home), result)

    return call


def skip_what_is_about_the_cpu(items: list[pytest.Item]) -> None:
    """Skip tests marked `cpu_only("why")` on other devices."""
    if DEVICE.type == "cpu":
        return
    for item in items:
        marker = item.get_closest_marker("cpu_only")
        if marker is not None:
            item.add_marker(pytest.mark.skip(reason=marker.args[0]))
