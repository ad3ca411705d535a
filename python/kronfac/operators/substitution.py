"""Calling a module with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(module: nn.Module, values: Mapping[str, Tensor], args: Any, kwargs: Any = None) -> Any:
    """Call a module with these tensors instead of those of its own, which are all put back.

    Tied tensors, and modules that are in several places, follow the one name that they have in `named_parameters()`
    and `named_buffers()`. torch's own `tie_weights` exchanges the tensors of such a module once for every place, and
    then puts the stand-ins back instead of the parameters (seen in torch 2.13).

    Args:
        module: the module.
        values: tensors by the names of `module.named_parameters()` and `module.named_buffers()`; where one is missing
            the module's own is used.
        args: a tuple of positional arguments.
        kwargs: keyword arguments.

    Returns:
        What the module returns.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stand_ins = {id(tensor): values[name] for name, tensor in named.items() if name in values}
    everywhere = {}
    for place, owner in module.named_modules():  # each module once
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and id(tensor) in stand_ins:
                everywhere[f"{place}.{name}" if place else name] = stand_ins[id(tensor)]
    return functional_call(module, everywhere, args, kwargs, tie_weights=False)
