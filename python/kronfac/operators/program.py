"""Model and loss as one function of the parameters, evaluated batch by batch with the checks that keep it honest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kronfac.operators.data import Batch, leaves, to_device
from kronfac.operators.isolation import RandomStreams, accelerator_devices
from kronfac.operators.substitution import call_with

LossFunction = Callable[[Any, Any], Tensor]
"""Called as loss_fn(output, targets); returns a scalar."""

_HALVES = (torch.bfloat16, torch.float16)

_TYPE_MISMATCHES = ("same dtype", "should be the same", "expected scalar type", "must match the data type", "dtype")

_NOT_TWICE = ("derivative for", "differentiate twice", "not implemented", "does not support", "double backward")


@dataclass(frozen=True, eq=False)
class LossEvaluation:
    """The loss of a batch as a function of the leaves.

    Attributes:
        loss: scalar with its graph.
        leaves: stand-ins of the chosen parameters that the graph ends in.
    """

    loss: Tensor
    leaves: list[Tensor]


@dataclass(frozen=True, eq=False)
class SplitEvaluation:
    """Model and loss of a batch as two graphs that meet at the output.

    Attributes:
        outputs: floating-point outputs of the model, with their graph to the leaves.
        cuts: their detached copies, of which the loss is a function.
        loss: scalar with its graph to the cuts.
        leaves: stand-ins of the chosen parameters.
    """

    outputs: list[Tensor]
    cuts: list[Tensor]
    loss: Tensor
    leaves: list[Tensor]


class Program(nn.Module):
    """loss_fn(model(inputs), targets) with the parameters as arguments.

    The model runs on stand-ins that share memory with its parameters: neither `.grad`, nor `requires_grad`, nor hooks
    on parameters are touched, frozen parameters can be differentiated, and buffers written in the forward are copies.

    Args:
        model: the model; a `torch.compile` wrapper is taken off (compiled graphs have no double backward).
        loss_fn: the loss.
        caller: the public function that error messages name.
        dtype: what parameters, buffers, inputs and targets are converted to, those of floating point; "model" converts
            nothing, None the half-precision ones of a half-precision model to float32.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, caller: str, dtype: torch.dtype | str | None = "model"
    ) -> None:
        super().__init__()
        self._dtype = dtype if isinstance(dtype, torch.dtype) else None
        self._widened = dtype is None and any(parameter.dtype in _HALVES for parameter in model.parameters())
        self.model = model
        self.loss_fn = loss_fn
        self.caller = caller
        devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
        self._device = next(iter(devices)) if len(devices) == 1 else None
        self._accelerators = accelerator_devices(model)
        self._graph_checked = False

    def compute_type(self, tensor: Tensor) -> torch.dtype:
        """The type in which the program holds a tensor."""
        if not tensor.is_floating_point():
            return tensor.dtype
        if self._dtype is not None:
            return self._dtype
        return torch.float32 if self._widened and tensor.dtype in _HALVES else tensor.dtype

    def evaluate(self, batch: Batch, chosen: Mapping[str, Tensor], *, twice: bool = True) -> LossEvaluation:
        """Run forward and loss with fresh leaves for the chosen parameters; `twice`: to be differentiated twice.

        Raises:
            ValueError, TypeError: the loss is no finite differentiable scalar, draws random numbers, or uses parameters
                through references of its own.
        """
        leaves, values = self._stand_ins(chosen)
        before = RandomStreams(self._accelerators)
        loss = self._run(batch, values, cut=False)
        self._check_loss(loss, before, batch)
        self._check_graph([loss], chosen, twice=twice)
        return LossEvaluation(loss.reshape(()), leaves)

    def value(self, batch: Batch, shifted: Mapping[str, Tensor]) -> float:
        """The loss with other values for some parameters, without a graph; it may be infinite or NaN.

        Raises:
            ValueError, TypeError: it is no real scalar, or draws random numbers.
        """
        _, values = self._stand_ins({})
        values.update((f"model.{name}", value) for name, value in shifted.items())
        before = RandomStreams(self._accelerators)
        with torch.no_grad():
            loss = self._run(batch, values, cut=False)
        self._check_scalar(loss, before)
        return float(loss)

    def evaluate_split(self, batch: Batch, chosen: Mapping[str, Tensor]) -> SplitEvaluation:
        """The same with the graph cut at the model's output.

        Raises:
            ValueError, TypeError: as `evaluate`, and when the loss reaches parameters other than through the output.
        """
        leaves, values = self._stand_ins(chosen)
        before = RandomStreams(self._accelerators)
        outputs, cuts, loss = self._run(batch, values, cut=True)
        self._check_loss(loss, before, batch)
        self._check_graph([loss, *outputs], chosen)
        if leaf_variables(graph_nodes([loss])) & {id(leaf) for leaf in leaves}:
            raise ValueError(
                f"{self.caller}: loss_fn: the loss depends on parameters other than through the model's output (a "
                "regulariser?), which the Gauss-Newton matrix does not see; take that term out and add its Hessian, "
                "or use kronfac.operators.hessian"
            )
        return SplitEvaluation(outputs, cuts, loss.reshape(()), leaves)

    def forward(self, batch: Batch, cut: bool) -> Any:
        """Called through `call_with`, so that the loss too sees the stand-ins in model.parameters()."""
        inputs, targets = (to_device(tree, self._device, self.compute_type) for tree in (batch.inputs, batch.targets))
        if isinstance(inputs, Mapping):
            output = self.model(**inputs)
        elif isinstance(inputs, tuple | list):
            output = self.model(*inputs)
        else:
            output = self.model(inputs)
        if not cut:
            return self.loss_fn(output, targets)
        flat, structure = pytree.tree_flatten(output)
        outputs, cuts = [], []
        for position, part in enumerate(flat):
            if isinstance(part, Tensor) and part.requires_grad:
                outputs.append(part)
                cuts.append(part.detach().requires_grad_())
                # A copy, because losses may write to their argument, which a leaf forbids.
                flat[position] = cuts[-1].clone()
        if not any(isinstance(part, Tensor) for part in flat):
            raise TypeError(
                f"{self.caller}: model: expected a tensor or a tuple, list or dict of tensors as output, "
                f"got {type(output).__name__}"
            )
        return outputs, cuts, self.loss_fn(pytree.tree_unflatten(flat, structure), targets)

    def _run(self, batch: Batch, values: dict[str, Tensor], *, cut: bool) -> Any:
        try:
            return call_with(self, values, (batch, cut))
        except RuntimeError as error:
            if not (self._dtype or self._widened) or not any(word in str(error) for word in _TYPE_MISMATCHES):
                raise
            raise RuntimeError(
                f"{self.caller}: the model was run in {self._dtype or torch.float32} (dtype=), but holds some tensors "
                f'of a type of its own: {str(error).splitlines()[0]}; pass dtype="model" to run it in its own types'
            ) from error

    def _stand_ins(self, chosen: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        leaves = {name: self._stand_in(parameter).requires_grad_() for name, parameter in chosen.items()}
        values: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            values[f"model.{name}"] = leaves[name] if name in leaves else self._stand_in(parameter)
        for name, buffer in self.named_buffers():
            values[name] = buffer.to(self.compute_type(buffer), copy=True)
        return [leaves[name] for name in chosen], values

    def _stand_in(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.compute_type(parameter))

    def _check_loss(self, loss: Any, before: RandomStreams, batch: Batch) -> None:
        self._check_scalar(loss, before)
        if not torch.isfinite(loss):
            why = self.culprit(batch) or (
                "model and data are finite, so that the forward or the loss overflows or divides by zero"
            )
            raise ValueError(f"{self.caller}: loss_fn: the loss is {loss.item()} on batch {batch.number}: {why}")

    def _check_scalar(self, loss: Any, before: RandomStreams) -> None:
        if before.moved():
            raise ValueError(
                f"{self.caller}: model, loss_fn: random numbers were drawn although the model is in eval mode, so that "
                "every product would be of another function; make the forward deterministic (functional dropout needs "
                "training=self.training)"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f'{self.caller}: loss_fn: expected a scalar tensor, got {got}; reduce it by "mean" or "sum"'
            )
        if not loss.dtype.is_floating_point:
            raise TypeError(f"{self.caller}: loss_fn: expected a real floating-point loss, got {loss.dtype}")

    def culprit(self, batch: Batch) -> str | None:
        """Where NaN or infinity comes from; None where model and batch have none."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        found = [name for name, tensor in named if not torch.isfinite(tensor.detach()).all()]
        if found:
            return f"the model holds NaN or infinity in {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        for what, tree in (("inputs", batch.inputs), ("targets", batch.targets)):
            for leaf in leaves(tree):
                array = torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fc" else leaf
                if isinstance(array, Tensor) and not torch.isfinite(array).all():
                    return f"the {what} of batch {batch.number} hold NaN or infinity"
        return None

    def _check_graph(self, roots: Sequence[Tensor], chosen: Mapping[str, Tensor], *, twice: bool = True) -> None:
        """Look through the graph of the first batch for what would silently be left out of the second derivative."""
        if self._graph_checked:
            return
        originals = {id(parameter) for parameter in [*self.model.parameters(), *chosen.values()]}
        nodes = graph_nodes(roots)
        if leaf_variables(nodes) & originals:
            raise ValueError(
                f"{self.caller}: model, loss_fn: parameters are used through references of its own (a list made "
                "beforehand, a closure), which would be left out of the derivative; take them from the model's "
                "attributes or model.parameters() when called"
            )
        if twice:
            refuse_once_differentiable(nodes, self.caller)
        self._graph_checked = twice


@contextmanager
def explained(caller: str) -> Iterator[None]:
    """Say what to do when autograd refuses the second derivative.

    Raises:
        RuntimeError: with the remedy, instead of autograd's.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in _NOT_TWICE):
            raise
        reason = str(error).split("\n", maxsplit=1)[0]
        raise RuntimeError(
            f"{caller}: the loss cannot be differentiated twice: {reason}. Replace that function by one whose backward "
            "is made of differentiable operations"
        ) from error


def refuse_constant(loss: Tensor, caller: str) -> None:
    """Refuse a loss without a graph.

    Raises:
        ValueError: the loss depends on none of the chosen parameters.
    """
    if not loss.requires_grad:
        raise ValueError(
            f"{caller}: the loss depends on none of the chosen parameters (are they unused, or is the model's output "
            "detached or computed under no_grad?)"
        )


def refuse_wrapper(model: Any, caller: str) -> nn.Module:
    """Return the module to differentiate: without a `torch.compile` wrapper.

    Raises:
        TypeError: no nn.Module, a scripted one, or a wrapper that runs on several devices or processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", None)
    module: nn.Module = inner if isinstance(inner, nn.Module) else model
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{caller}: model: a scripted module cannot run on other tensors; pass the original module")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"{caller}: model: expected the module itself, got {type(module).__name__}; pass model.module "
            "(under a process group, each rank with its share of the data)"
        )
    return module


def differentiate(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> list[Tensor | None]:
    """Vector-Jacobian product that keeps the graph by default; None where nothing depends on an input.

    Args:
        outputs: values; None or values without a graph contribute nothing.
        inputs: what to differentiate with respect to.
        vectors: one per output.
        create_graph: whether the result can be differentiated again.
        retain_graph: whether the outputs can be.
    """
    live = [
        (output, vector)
        for output, vector in zip(outputs, vectors, strict=True)
        if output is not None and output.requires_grad
    ]
    if not live:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [output for output, _ in live],
            list(inputs),
            [vector for _, vector in live],
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    )


def refuse_once_differentiable(nodes: set[Any], caller: str) -> None:
    """Refuse a graph with a function of which autograd would take the second derivative for zero.

    Raises:
        RuntimeError: a node is marked with @once_differentiable.
    """
    for node in nodes:
        function = getattr(type(node), "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        # The decorator's `wrapper` lives in torch's own file. It raises only where the incoming gradient has a
        # graph; elsewhere the result is taken for a constant, and the second derivative is silently zero.
        if code is not None and (code.co_name, code.co_filename) == ("wrapper", torch.autograd.function.__file__):
            raise RuntimeError(
                f"{caller}: the loss cannot be differentiated twice: {type(node).__name__} is marked with "
                "@once_differentiable; replace it by a function whose backward is made of differentiable operations"
            )


def graph_nodes(roots: Sequence[Tensor]) -> set[Any]:
    """All nodes of the graphs that end in the given tensors."""
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return seen


def leaf_variables(nodes: set[Any]) -> set[int]:
    """Identities of the leaf tensors that gradients of these nodes accumulate in."""
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}
