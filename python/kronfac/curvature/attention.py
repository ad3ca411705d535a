"""nn.MultiheadAttention: four linear layers, none of which is called as a module."""

from __future__ import annotations

import math
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.forward import OutputEdge, OutputView
from kronfac.curvature.linear import LinearAdapter
from kronfac.curvature.registry import register_adapter

if TYPE_CHECKING:
    from kronfac.curvature.hooks import LayerHook

_FUNCTIONS = ("multi_head_attention_forward", "_in_projection_packed", "_in_projection")
_local = threading.local()


@register_adapter(nn.MultiheadAttention)
class ProjectionAdapter(LinearAdapter):
    """One projection of `torch.nn.MultiheadAttention`: "q_proj", "k_proj", "v_proj" or "out_proj".

    The first three are rows of the packed ``in_proj_weight`` and ``in_proj_bias``, or have weights of their own where
    kdim or vdim differ. Inputs and gradients are taken batch first whatever the module's layout is: positions (N, T).
    ``bias_k`` and ``bias_v`` are not covered.

    Args:
        module: the attention.
        name: of the projection.
        tap: what sees the projections of this module run.
    """

    def __init__(self, module: nn.Module, name: str, tap: Tap) -> None:
        attention = cast(nn.MultiheadAttention, module)
        self._tap, self._name = tap, name
        if name == "out_proj":
            super().__init__(attention.out_proj)
            return
        index, size = ("q_proj", "k_proj", "v_proj").index(name), attention.embed_dim
        rows = slice(index * size, (index + 1) * size)
        packed = attention.in_proj_weight is not None
        self._weight_name = "in_proj_weight" if packed else f"{name}_weight"
        self.slices = (rows if packed else slice(None), rows)
        super().__init__(module)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Plain parameters throughout; see `LayerAdapter.supports`."""
        assert isinstance(module, nn.MultiheadAttention)
        packed = module._qkv_same_embed_dim
        names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        weights = [module._parameters.get(name) for name in names]
        bias = module._parameters.get("in_proj_bias")
        if getattr(module, "in_proj_bias", None) is not bias or any(weight is None for weight in weights):
            return False
        plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in (*weights, bias) if p is not None)
        out = module.out_proj
        own = super().supports(out)
        return plain and own and type(out) is NonDynamicallyQuantizableLinear

    @classmethod
    def layers_of(cls, module: nn.Module) -> dict[str, LayerAdapter]:
        """The four projections."""
        tap = Tap(cast(nn.MultiheadAttention, module))
        return {name: cls(module, name, tap) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}

    @property
    def owners(self) -> tuple[Tensor, Tensor | None]:
        """The parameters that weight and bias are rows of; see `LayerAdapter.owners`."""
        if self._name == "out_proj":
            return super().owners
        weight = self.module._parameters[self._weight_name]
        assert weight is not None
        return weight, self.module._parameters.get("in_proj_bias")

    def listen(self, hook: LayerHook) -> list[RemovableHandle]:
        """See `LayerAdapter.listen`; the tap calls the hook."""
        return self._tap.listen(self, hook)


class Tap:
    """Sees the projections of one attention run.

    `nn.MultiheadAttention` calls `functional.multi_head_attention_forward`, which calls `functional.linear` on its
    weights. While a recorder listens, a function mode runs that very code with a `linear` that also hands over what it
    was given and what it returned; nothing is replaced for anyone else. Where torch's code is not as expected,
    nothing is seen, and the parameters train as SGD after the optimizer's warning.

    Args:
        module: the attention.

    Attributes:
        listeners: the projections that are watched, and whom to tell.
        batch: N of the forward that runs.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.listeners: OrderedDict[int, tuple[ProjectionAdapter, LayerHook]] = OrderedDict()
        self.batch = 1
        self._mode: _Redirection | None = None

    def listen(self, adapter: ProjectionAdapter, hook: LayerHook) -> list[RemovableHandle]:
        """Hand a projection's calls over to a hook; returns what takes that back."""
        handle = RemovableHandle(self.listeners)
        self.listeners[handle.id] = (adapter, hook)
        enter, leave = _TapHook(self, "enter"), _TapHook(self, "leave")
        return [
            handle,
            self.module.register_forward_pre_hook(enter),
            self.module.register_forward_hook(leave, always_call=True),
        ]

    def enter(self) -> None:
        """The module's forward begins."""
        if self._mode is None and any(hook.listens(adapter.module) for adapter, hook in self.listeners.values()):
            _taps().append(self)
            self._mode = _Redirection()
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """It has ended, with an output or with an exception."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            _taps().remove(self)

    def see(self, x: Tensor, weight: Tensor, output: Tensor) -> None:
        """`linear` has run on a weight, of this module or not.

        Args:
            x: (T, N, in), or (T·N, in) for the output projection.
            weight: a parameter, or rows of one.
            output: (..., rows of the weight).
        """
        owner = weight if weight._base is None else weight._base
        start = (weight.storage_offset() - owner.storage_offset()) // max(weight.stride(0), 1)
        for adapter, hook in list(self.listeners.values()):
            if adapter.owners[0] is not owner:
                continue
            first = 0 if adapter.slices is None else adapter.slices[0].start or 0
            if not start <= first < start + len(weight):
                continue
            if x.dim() == 2:
                x = x.reshape(-1, self.batch, x.shape[-1])
            positions = (x.shape[1], x.shape[0])
            place = partial(_part, positions=positions, start=first - start, size=adapter.out_features)
            hook(adapter.module, (x.transpose(0, 1),), {}, output, place)


def _part(output: Tensor, *, positions: tuple[int, int], start: int, size: int) -> OutputEdge:
    """The edge of a projection's output, batch first, inside what one `linear` returned.

    Args:
        output: (T, N, features) or (T·N, features).
        positions: N and T.
        start: first feature of the projection.
        size: how many it has.
    """
    edge, view = OutputEdge.of(output)
    features = output.shape[-1]
    if view.layout is None:
        view = OutputView(output.shape, ((*(features * n for n in _strides(output.shape[:-1])), 1), 0))
    assert view.layout is not None
    stride, offset = view.layout
    step, unit = stride[-2], stride[-1]  # from one example to the next at the same token, features
    shape = torch.Size((*positions, size))
    return OutputEdge(edge, OutputView(shape, ((step, step * positions[0], unit), offset + start * unit)))


def _strides(shape: torch.Size) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


class _Redirection(TorchFunctionMode):
    """Runs torch's attention with a `linear` that tells the taps."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.multi_head_attention_forward:
            query = cast(Tensor, args[0])  # (T, N, E), or (T, E) without a batch
            for tap in _taps():
                tap.batch = query.shape[1] if query.dim() == 3 else 1
            func = _recording(func)
        return func(*args, **(kwargs or {}))


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function over the same globals, but for `linear`."""
    namespace = dict(vars(functional))
    originals = [namespace.get(name) for name in _FUNCTIONS]
    for original in originals:
        if not isinstance(original, types.FunctionType) or "linear" not in original.__code__.co_names:
            return function
        if original.__globals__ is not vars(functional):
            return function
    namespace["linear"] = _linear
    for name, original in zip(_FUNCTIONS, originals, strict=True):
        assert isinstance(original, types.FunctionType)
        copy = types.FunctionType(original.__code__, namespace, name, original.__defaults__, original.__closure__)
        copy.__kwdefaults__ = original.__kwdefaults__
        namespace[name] = copy
    return cast("Callable[..., Any]", namespace[_FUNCTIONS[0]])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = functional.linear(input, weight, bias)
    for tap in list(_taps()):
        tap.see(input, weight, output)
    return output


def _taps() -> list[Tap]:
    """Of the attentions whose forward runs in this thread, outermost first."""
    if not hasattr(_local, "taps"):
        _local.taps = []
    return cast("list[Tap]", _local.taps)


class _TapHook:
    """A module hook that knows its tap weakly, and works for no copy of the module."""

    def __init__(self, tap: Tap | None = None, method: str = "") -> None:
        self._tap = None if tap is None else weakref.ref(tap)
        self._method = method

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Called by torch before or after forward."""
        if torch.compiler.is_compiling() or self._tap is None:
            return
        tap = self._tap()
        if tap is not None and tap.module is module:
            getattr(tap, self._method)()

    def __deepcopy__(self, memo: dict[int, Any]) -> _TapHook:
        """An inert hook."""
        return type(self)()

    def __reduce__(self) -> tuple[type[_TapHook], tuple[()]]:
        """As an inert hook."""
        return type(self), ()
