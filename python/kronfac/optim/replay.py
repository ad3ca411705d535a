"""Running the forwards of a closure again, as functions of the parameters, without leaving a trace."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from kronfac.curvature import Recorder
from kronfac.curvature.hooks import obstacle, unrecorded
from kronfac.operators.isolation import RandomStreams, accelerator_devices, differentiable_twice, preserved_streams
from kronfac.operators.program import graph_nodes, leaf_variables, refuse_once_differentiable
from kronfac.operators.substitution import call_with

_CALLER = "KFAC.step: adaptive=True"
_NO_FORWARD_MODE = ("forward AD", "forward-mode", "jvp")


@dataclass(frozen=True, eq=False)
class Call:
    """One forward of the model inside the closure.

    Attributes:
        args: what the model was called with, by reference.
        kwargs: likewise.
        versions: every tensor among them with its version at the call.
        modes: `training` of every submodule.
        streams: where the random streams stood.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[tuple[Tensor, int]]
    modes: list[tuple[nn.Module, bool]]
    streams: RandomStreams


@dataclass(frozen=True, eq=False)
class Pushed:
    """A forward and its derivatives along some directions in the space of the parameters.

    Attributes:
        logits: what the likelihood is a distribution over, detached.
        mask: terms that count, None for all.
        tangents: J v for each direction, shape of the logits.
    """

    logits: Tensor
    mask: Tensor | None
    tangents: list[Tensor]


class Replayer:
    """Remembers how a closure called the model, and multiplies by the Jacobian of those forwards.

    J v is taken in forward mode with dual numbers in the parameters themselves, so that it does not matter how the
    model refers to them; a model that has no forward mode is differentiated backwards twice instead. The model runs in
    its own modes, from the same random numbers, in the parameters' own type (autocast is off); buffers, random streams
    and `.grad` are as before afterwards. Hooks that the user has put on modules run.

    Args:
        model: the root; a DistributedDataParallel is looked through.
        output: picks the logits from what the model returns, None for the identity.
        mask: from args, kwargs and output to the terms that count; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any, Any, Any], Tensor] | None = None,
    ) -> None:
        self._output, self._mask = output, mask
        # The wrapper's own forward prepares a backward pass, which must follow.
        self._model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._recorder: Recorder | None = None
        self._forward_mode = True
        self.calls: list[Call] = []

    @contextmanager
    def listening(self, recorder: Recorder) -> Iterator[None]:
        """Remember the forwards inside that a loss may be differentiated through, whatever the mode of the model.

        Args:
            recorder: of the model; forwards that are for its statistics alone are left out.
        """
        self.calls, self._recorder = [], recorder
        hook = self._model.register_forward_pre_hook(self._remember, prepend=True, with_kwargs=True)
        try:
            yield
        except BaseException:
            self.calls = []
            raise
        finally:
            hook.remove()

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self._recorder
        if torch.compiler.is_compiling() or recorder is None or recorder.update_only or obstacle(recorder) is not None:
            return
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.calls.append(
            Call(
                args,
                dict(kwargs),
                [(tensor, tensor._version) for tensor in tensors],
                [(submodule, submodule.training) for submodule in module.modules()],
                RandomStreams(accelerator_devices(module)),
            )
        )

    def push(self, call: Call, directions: Sequence[Mapping[Tensor, Tensor]]) -> Pushed:
        """J v of one forward for each direction v, given by parameter; parameters that are not in it stand still.

        Raises:
            RuntimeError: an input was modified in place since; the model has neither a forward mode nor a second
                derivative.
            TypeError: the model's output is no tensor.
        """
        if any(tensor._version != version for tensor, version in call.versions):
            raise RuntimeError(
                f"{_CALLER}: an input of the model was modified in place after the forward, which is run again for the "
                "quadratic model; copy it instead"
            )
        if self._forward_mode:
            try:
                return self._push_forward(call, directions)
            except (NotImplementedError, RuntimeError) as error:
                if not any(phrase in str(error) for phrase in _NO_FORWARD_MODE):
                    raise
                reason = str(error).split("\n", maxsplit=1)[0]
            self._forward_mode = False
        else:
            reason = "it has no forward mode"
        try:
            return self._push_backward(call, directions)
        except RuntimeError as error:
            raise RuntimeError(
                f"{_CALLER}: the model can be differentiated neither in forward mode ({reason}) nor twice "
                f"({error}); use adaptive=False with an lr"
            ) from error

    def _push_forward(self, call: Call, directions: Sequence[Mapping[Tensor, Tensor]]) -> Pushed:
        with warnings.catch_warnings():  # torch scripts some derivatives when it first needs them, and deprecates that
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("torch._decomp.decompositions_for_jvp")
        tangents: list[Tensor] = []
        logits, mask = torch.empty(0), None
        for direction in directions or [{}]:
            with (
                self._again(call),
                _frozen([*self._model.parameters(), *direction]),
                forward_ad.dual_level(),
                _ConstantsUnderNoGrad(),
            ):
                for parameter, tangent in direction.items():
                    # In place: whatever refers to the parameter sees a dual number of the same value.
                    parameter.copy_(forward_ad.make_dual(parameter.detach(), tangent))  # type: ignore[no-untyped-call]
                result, mask = self._run(call)
                primal, tangent_out = forward_ad.unpack_dual(result)  # type: ignore[no-untyped-call]
                logits = primal.detach()
                tangents.append(torch.zeros_like(logits) if tangent_out is None else tangent_out.detach())
        return Pushed(logits, mask, tangents[: len(directions)])

    def _push_backward(self, call: Call, directions: Sequence[Mapping[Tensor, Tensor]]) -> Pushed:
        """J v as the derivative of Jᵀu with respect to u."""
        moving = {name: p for name, p in self._model.named_parameters() if any(p in some for some in directions)}
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in moving.items()}
        with self._again(call):
            result, mask = self._run(call, leaves)
            nodes = graph_nodes([result])
            if leaf_variables(nodes) & {id(parameter) for some in directions for parameter in some}:
                raise RuntimeError("parameters are used through references of the model's own")
            refuse_once_differentiable(nodes, _CALLER)
            if not result.requires_grad:
                return Pushed(result, mask, [torch.zeros_like(result) for _ in directions])
            cotangent = torch.zeros_like(result, requires_grad=True)
            pullbacks = torch.autograd.grad(
                result, list(leaves.values()), cotangent, create_graph=True, allow_unused=True
            )
            tangents = []
            for direction in directions:
                pairs = [
                    (pullback, direction[parameter])
                    for pullback, parameter in zip(pullbacks, moving.values(), strict=True)
                    if pullback is not None and pullback.requires_grad and parameter in direction
                ]
                tangent = None
                if pairs:
                    (tangent,) = torch.autograd.grad(
                        [pullback for pullback, _ in pairs],
                        cotangent,
                        [vector for _, vector in pairs],
                        retain_graph=True,
                        allow_unused=True,
                    )
                tangents.append(torch.zeros_like(result) if tangent is None else tangent.detach())
        return Pushed(result.detach(), mask, tangents)

    def _run(self, call: Call, leaves: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach(), (call.args, call.kwargs))
        out = self._model(*args, **kwargs) if leaves is None else call_with(self._model, leaves, args, kwargs)
        logits = out if self._output is None else self._output(out)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{_CALLER}: output: expected a tensor of logits, got a {type(logits).__name__}; "
                "pass output=lambda out: ... to pick the logits from what the model returns"
            )
        return logits, None if self._mask is None else self._mask(args, kwargs, out)

    @contextmanager
    def _again(self, call: Call) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(untouched(self._model))
            stack.enter_context(differentiable_twice(self._model))
            if any(isinstance(module, nn.RNNBase) for module in self._model.modules()):
                # oneDNN's recurrent kernels have neither forward mode nor a second derivative; torch's own cells do.
                with warnings.catch_warnings():  # setting any of its flags warns once of those for other devices
                    warnings.simplefilter("ignore", UserWarning)
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(preserved_streams(call.streams))
            for module, mode in call.modes:
                module.training = mode
            yield


class _ConstantsUnderNoGrad(TorchFunctionMode):
    """What the model computes under no_grad is a constant of its derivative, as it is in backward mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            return function(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return function(*args, **(kwargs or {}))


@contextmanager
def _frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """None of the parameters requires a gradient inside, so that gradients are enabled but no graph is made."""
    training = [parameter for parameter in parameters if parameter.requires_grad]
    # Attention would take its inference kernel, which has no forward mode.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Buffers and modes are afterwards what they were, and no recorder takes statistics inside."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with unrecorded():
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


@contextmanager
def reevaluated(
    model: nn.Module, parameters: Sequence[Tensor], recorder: Recorder, start: RandomStreams
) -> Iterator[None]:
    """Run a closure once more: from the same random numbers, unrecorded, and with nothing of the model's state changed.

    Args:
        model: that the closure runs.
        parameters: whose `.grad` is kept, beside those of the model.
        recorder: of the model.
        start: where the random streams stood before the closure ran first.
    """
    owners = {id(p): p for p in [*model.parameters(), *parameters]}.values()
    # A distributed wrapper may have made `.grad` a view of memory that the next backward writes to.
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    grads = [(p, p.grad, p.grad.clone() if shared and p.grad is not None else None) for p in owners]
    for parameter, _, _ in grads:
        parameter.grad = None
    try:
        with untouched(model), recorder.suspend(), preserved_streams(start), torch.enable_grad():
            yield
    finally:
        for parameter, grad, copy in grads:
            parameter.grad = grad
            if grad is not None and copy is not None:
                with torch.no_grad():
                    grad.copy_(copy)
