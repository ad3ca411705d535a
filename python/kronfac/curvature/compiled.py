"""Compiled models: the forwards of which statistics are taken run uncompiled, because hooks do not run in a graph."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this very module runs compiled code: the result of `torch.compile`, or ``module.compile()``."""
    # OptimizedModule passes on what it has not itself, so it is asked by type.
    return _is_optimized(module) or module._compiled_call_impl is not None


def hides_hooks(module: nn.Module) -> bool:
    """Whether the module's own hooks run inside compiled code, where they cannot record: after ``module.compile()``."""
    return module._compiled_call_impl is not None and not _is_optimized(module)


def uncompiled(model: nn.Module) -> AbstractContextManager[Any] | None:
    """A context in which compiled code runs as plain torch; None where nothing of the model is compiled.

    It holds for the whole process while it lasts. What was compiled before is used again afterwards.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and asking costs nothing
        return None
    # As model.modules(), whose generators within generators take five times as long.
    seen: dict[nn.Module, None] = {model: None}
    found = list(seen)
    for module in found:
        if is_compiled(module):
            break
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen[child] = None
                found.append(child)
    else:
        return None
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _is_optimized(module: nn.Module) -> bool:
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)
