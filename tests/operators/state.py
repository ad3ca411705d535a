"""Everything about a model and its surroundings that an analysis must leave as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def _random_streams(generators: tuple[torch.Generator, ...]) -> list[Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    numpy_state = (kind, keys.tolist(), position, has_gauss, cached)
    generator_states = [generator.get_state().tolist() for generator in generators]
    return [random.getstate(), numpy_state, torch.get_rng_state().tolist(), generator_states]


def _settings() -> list[Any]:
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    ]


def _content(tensor: torch.Tensor) -> list[Any]:
    """Shape and bits: NaN is the same as before though it is not equal to itself."""
    return [tuple(tensor.shape), tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()]


def snapshot(model: nn.Module, *generators: torch.Generator) -> dict[str, Any]:
    """All that counts, by value."""
    seen: dict[str, Any] = {"streams": _random_streams(generators), "settings": _settings()}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"mode of {name}"] = module.training
        seen[f"hooks of {name}"] = [list(getattr(module, hooks).items()) for hooks in _HOOKS]
        seen[f"attributes of {name}"] = sorted(vars(module))
        seen[f"members of {name}"] = [list(module._parameters), list(module._buffers), list(module._modules)]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = parameter.grad
        seen[f"parameter {name}"] = [
            id(parameter),
            type(parameter),
            parameter.data_ptr(),
            parameter._version,
            parameter.requires_grad,
            _content(parameter),
            list((parameter._backward_hooks or {}).items()),
            None if grad is None else [id(grad), grad._version, _content(grad)],
        ]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        seen[f"buffer {name}"] = [id(buffer), buffer.data_ptr(), buffer._version, _content(buffer)]
    return seen


@contextmanager
def unchanged(model: nn.Module, *generators: torch.Generator) -> Iterator[None]:
    """Fail unless the model, the random streams and torch's settings are the same after the block, error or not."""
    before = snapshot(model, *generators)
    try:
        yield
    finally:
        after = snapshot(model, *generators)
        assert before.keys() == after.keys()
        changed = [key for key in before if before[key] != after[key]]
        assert not changed, f"changed by the analysis: {changed}"
