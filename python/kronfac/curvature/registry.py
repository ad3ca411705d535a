"""Which adapter covers which layer type: one entry per type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kronfac.curvature.adapter import LayerAdapter

_Adapter = TypeVar("_Adapter", bound=type[LayerAdapter])

# The projection inside nn.MultiheadAttention is a Linear that is never called as a module: hooks would wait in vain.
_ADAPTERS: dict[type[nn.Module] | str, type[LayerAdapter] | None] = {NonDynamicallyQuantizableLinear: None}


def register_adapter(module_type: type[nn.Module] | str) -> Callable[[_Adapter], _Adapter]:
    """Class decorator: cover a layer type with an adapter, in place of an earlier one if there was.

    Args:
        module_type: the layer type, or "package.module.Name" of a type in a package that need not be there. Subclasses
            are covered too as long as they keep its forward.

    Returns:
        The decorator; it returns the adapter class unchanged.

    Raises:
        TypeError: not a module type, or not an adapter class.
    """
    named = isinstance(module_type, str) and "." in module_type
    if not named and not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_adapter: module_type: expected a subclass of torch.nn.Module, got {module_type!r}")

    def register(adapter_type: _Adapter) -> _Adapter:
        if not (isinstance(adapter_type, type) and issubclass(adapter_type, LayerAdapter)):
            raise TypeError(f"register_adapter: expected a subclass of LayerAdapter, got {adapter_type!r}")
        _ADAPTERS[module_type] = adapter_type
        return adapter_type

    return register


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """An adapter bound to a layer.

    Args:
        module: any module.

    Returns:
        Its adapter; None when its type, its options or a forward of its own are covered by none, and for a module
        that is several layers at once (see `adapters_for`).

    Raises:
        ValueError: a lazy layer whose parameters do not exist yet.
    """
    return adapters_for(module).get("")


def adapters_for(module: nn.Module) -> dict[str, LayerAdapter]:
    """The adapters bound to a module, by the name that each adds to the module's: "" for a module that is one layer.

    Args:
        module: any module.

    Returns:
        Empty when its type, its options or a forward of its own are covered by none.

    Raises:
        ValueError: as `adapter_for`.
    """
    for base in type(module).__mro__:
        if not issubclass(base, nn.Module):
            continue
        key = base if base in _ADAPTERS else f"{base.__module__}.{base.__qualname__}"
        if key not in _ADAPTERS:
            continue
        if type(module).forward is not base.forward or "forward" in vars(module):
            return {}
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(
                f"adapter_for: module: {module} has no parameters yet; call the model once on real input before its "
                "curvature is asked for"
            )
        adapter_type = _ADAPTERS[key]
        return adapter_type.layers_of(module) if adapter_type is not None and adapter_type.supports(module) else {}
    return {}


def find_layers(model: nn.Module) -> dict[str, LayerAdapter]:
    """Adapters of all layers of a model that can be covered.

    Args:
        model: the model.

    Returns:
        Adapters by layer name, in the order of ``model.named_modules()``; layers without trainable weight, and
        layers whose parameters another module shares, are left out: no single layer's statistics describe those.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[str, LayerAdapter] = {}
    for name, module in model.named_modules():
        for suffix, adapter in adapters_for(module).items():
            if adapter.parameters() and all(owners[id(p)] == 1 for p in adapter.parameters()):
                found[".".join(filter(None, (name, suffix)))] = adapter
    return found
