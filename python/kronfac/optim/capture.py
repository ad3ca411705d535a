"""Steps inside a CUDA graph: which ones can be captured, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kronfac.optim.groups import Groups
from kronfac.optim.update import MOMENTUM


def capturing(device: torch.device) -> bool:
    """Whether what is called now goes into a CUDA graph instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(reasons: Mapping[str, bool]) -> None:
    """Refuse a step that cannot be captured.

    Args:
        reasons: what stands in the way, each with whether it does.

    Raises:
        RuntimeError: something does.
    """
    for reason, holds in reasons.items():
        if holds:
            raise RuntimeError(
                f"KFAC.step: this step cannot be captured in a CUDA graph: {reason}. Capture a step for which "
                "next_step_is_plain is True, after at least one such step was taken without a graph"
            )


def lacks_buffers(groups: Groups, state: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    """Whether the step would allocate momentum buffers, which would then belong to the graph's memory."""
    return any(
        p.grad is not None and MOMENTUM not in state.get(p, {})
        for group in groups
        if group["momentum"]
        for p in group["params"]
    )
