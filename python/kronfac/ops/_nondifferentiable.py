"""Operators without a derivative refuse inputs that require grad: no result is cut off from the graph unseen."""

from __future__ import annotations

from typing import Any

import torch

_LIBRARY = torch.library.Library("kronfac", "IMPL")  # type: ignore[no-untyped-call]


def refuse_gradients(name: str, remedy: str = "detach it or call under torch.no_grad()") -> None:
    """Make ``torch.ops.kronfac.<name>`` raise when grad mode is on and a tensor argument requires grad.

    The check sits at the dispatcher's autograd key, so that it also holds for direct calls of the operator and while
    `torch.compile` traces; below it the call continues as if the key were not there.

    Args:
        name: the operator's name without namespace.
        remedy: what the error message advises.
    """
    overload = getattr(torch.ops.kronfac, name).default
    arguments = [argument.name for argument in overload._schema.arguments]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in [*zip(arguments, args, strict=False), *kwargs.items()]:
                tensors = value if isinstance(value, (list, tuple)) else [value]
                if any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors):
                    raise RuntimeError(
                        f"kronfac::{name}: {argument}: expected a tensor that does not require grad, "
                        f"got one that does: the operator is not differentiable; {remedy}"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
