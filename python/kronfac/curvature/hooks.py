"""The module hooks of a recorder, and the circumstances under which they do nothing."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kronfac.curvature.forward import OutputEdge

if TYPE_CHECKING:
    from kronfac.curvature.recorder import Recorder

_local = threading.local()


@contextmanager
def unrecorded(except_for: Recorder | None = None) -> Iterator[None]:
    """No recorder takes statistics inside: for analyses that run a model which an optimizer watches.

    Args:
        except_for: the one recorder that still does.

    Yields:
        Nothing.
    """
    before = getattr(_local, "state", None)
    _local.state = (except_for,)
    try:
        yield
    finally:
        _local.state = before


def obstacle(recorder: Recorder) -> str | None:
    """Why the forward that begins now cannot be recorded, None when it can."""
    state = getattr(_local, "state", None)
    if state is not None and state[0] is not recorder:
        return "it was an analysis of kronfac's own"
    # Re-computation under checkpointing: the same examples were recorded in the forward.
    if in_backward():
        return "it ran inside a backward pass (checkpointing recomputes layers there)"
    if torch.is_inference_mode_enabled():
        return "it ran under torch.inference_mode()"
    if not torch.is_grad_enabled():
        return "it ran under torch.no_grad()"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "it ran under a torch.func transform or forward-mode differentiation"
    if recorder.generator.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "it was being captured in a CUDA graph"
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))
    if torch._C._get_tracing_state() is not None or any(mode is not None for mode in modes):
        return "it was being traced or exported"
    return None


def in_backward() -> bool:
    """Whether this thread is inside a backward pass of autograd."""
    return bool(torch._C._current_graph_task_id() != -1)


class Inert:
    """What becomes of a hook where its module is copied or pickled: the copy is not watched."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Called as the hook was, or otherwise: torch.ao.quantization moves hooks to modules of another type."""


class Hook:
    """A hook that knows its recorder and its module weakly, and works for no copy of that module.

    A copied or unpickled module brings its hooks along, as `Inert` ones.

    Args:
        recorder: whom to tell.
        module: the module that the hook is registered on.
        name: of the covered layer, "" for the root.
    """

    def __init__(self, recorder: Recorder, module: nn.Module, name: str = "") -> None:
        self._recorder = weakref.ref(recorder)
        self._module = weakref.ref(module)
        self._name = name

    def _listener(self, module: nn.Module) -> Recorder | None:
        return self._recorder() if self._module() is module else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        """Does nothing."""
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        """As one that does nothing."""
        return Inert, ()

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # what torch.jit.script asks a hook for first; it could not translate it anyway
            raise AttributeError(
                "kronfac: torch.jit.script cannot translate the hooks of a model that an optimizer watches; delete the "
                "optimizer, or script a fresh model with load_state_dict(model.state_dict())"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


# In each of them is_compiling comes first: dynamo and export then see nothing but a constant.


class OpenHook(Hook):
    """Forward pre-hook of the root: opens a recording."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Called by torch before forward."""
        if torch.compiler.is_compiling():
            return
        recorder = self._listener(module)
        if recorder is not None:
            recorder.open()


class LayerHook(Hook):
    """Forward hook of a covered layer: hands over its input and the edge of its output."""

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        place: Callable[[Tensor], OutputEdge] = OutputEdge.of,
    ) -> None:
        """Called by torch after forward; `place` says where the layer's output lies in `output`."""
        if torch.compiler.is_compiling():
            return
        recorder = self._listener(module)
        if recorder is None:
            return
        if recorder.is_open and not in_backward():
            recorder.see(self._name, args, kwargs, output, place)
        if recorder.rows.enabled and self._name in recorder.rows.limits:
            recorder.keep_rows(self._name, args, kwargs, output)

    def listens(self, module: nn.Module) -> bool:
        """Whether a forward of the module that begins now is recorded."""
        recorder = self._listener(module)
        return recorder is not None and recorder.is_open and not in_backward()


class CloseHook(Hook):
    """Forward hook of the root: closes the recording. Also called when forward raised."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Called by torch after forward."""
        if torch.compiler.is_compiling():
            return
        recorder = self._listener(module)
        if recorder is not None and recorder.is_open and not in_backward():
            recorder.close(args, kwargs, output)
