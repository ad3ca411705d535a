"""The overload `detached` of each operator: the same kernels without a stop in Python on the way to them.

An operator with a derivative, or one that refuses inputs that require grad, has a kernel in Python at the dispatcher's
autograd key, and every call passes through it, even where nothing requires grad: about 4 us, twice as long as torch
takes for the product of two small matrices. The typed functions call the overload where no graph can be wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("kronfac", "IMPL")  # type: ignore[no-untyped-call]

# Looked up once: the calls of a small operator are counted in tenths of a microsecond.
_is_compiling = torch.compiler.is_compiling
_functorch_levels = torch._C._functorch.peek_interpreter_stack


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a fake for an operator and for its overload `detached`."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"kronfac::{name}", fake)
        torch.library.register_fake(f"kronfac::{name}.detached", fake)
        return fake

    return register


def detached(name: str) -> Callable[..., Any]:
    """The overload of an operator, for inputs that nobody differentiates.

    What comes back is the function below the overload's ``__call__``, which does nothing but pass its arguments on.
    """
    _LIBRARY.impl(f"{name}.detached", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    function: Callable[..., Any] = getattr(torch.ops.kronfac, name).detached._op
    return function


def tracing() -> bool:
    """Whether the call is compiled, exported or transformed by `torch.func`: they have to see the operator itself."""
    return _is_compiling() or _functorch_levels() is not None


def wants_graph(*lists: Sequence[Tensor]) -> bool:
    """Whether a call with these tensors must go through the operator itself."""
    if tracing():
        return True
    if torch.is_grad_enabled():
        for item in lists:
            for tensor in item:
                if tensor.requires_grad:
                    return True
    return False
