"""Gradients of a loss with respect to its inputs, from a model in eval mode that keeps no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.curvature import unrecorded
from kronfac.operators.data import to_device
from kronfac.operators.isolation import RandomStreams, accelerator_devices, evaluation_mode, preserved_streams
from kronfac.operators.program import LossFunction, refuse_wrapper
from kronfac.operators.substitution import call_with


class IsolatedModel(nn.Module):
    """A model and its loss, run on stand-ins of parameters and buffers.

    Neither `.grad`, nor `requires_grad`, nor hooks on parameters are touched, buffers written in the forward are
    copies, and optimizers that watch the model record nothing.

    Args:
        model: the model; a `torch.compile` wrapper is taken off.
        loss_fn: called as loss_fn(output, targets).
        reduction: what it does over the examples, "mean" or "sum".
        caller: the public function that error messages name.

    Raises:
        TypeError: no module, or one that cannot run on other tensors; a loss that cannot be called.
        ValueError: another reduction.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, reduction: str, caller: str) -> None:
        super().__init__()
        self.model = refuse_wrapper(model, caller)
        if not callable(loss_fn):
            raise TypeError(f"{caller}: loss_fn: expected a callable (output, targets), got {type(loss_fn).__name__}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{caller}: reduction: expected "mean" or "sum", got {reduction!r}')
        self._loss_fn, self._mean, self._caller = loss_fn, reduction == "mean", caller
        self._accelerators = accelerator_devices(self.model)
        devices = {tensor.device for tensor in [*self.model.parameters(), *self.model.buffers()]}
        self._device = next(iter(devices)) if len(devices) == 1 else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Eval mode, gradients on, nothing recorded, and the random streams put back afterwards."""
        with ExitStack() as stack:
            stack.enter_context(preserved_streams(RandomStreams(self._accelerators)))
            stack.enter_context(evaluation_mode(self))
            stack.enter_context(unrecorded())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if any(isinstance(module, nn.RNNBase) for module in self.model.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # no backward in eval mode
            # A TransformerEncoder hands its later layers nested tensors, which have no gradient.
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            yield

    def gradient(self, inputs: Tensor, targets: Any) -> Tensor:
        """∇ of the sum of all examples' losses, shaped like the inputs: the examples' own gradients, whatever their
        number.

        Raises:
            ValueError: the loss is no finite scalar, or does not depend on the inputs, or has no finite gradient.
        """
        leaf = inputs.clone().requires_grad_()
        loss = self._call(leaf, targets, with_loss=True)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f'{self._caller}: loss_fn: expected a scalar tensor, got {got}; reduce it by "mean" or "sum"'
            )
        if not torch.isfinite(loss.detach()).all():
            raise ValueError(f"{self._caller}: loss_fn: the loss is {loss.item()}: {self._culprit(targets)}")
        found = None
        if loss.requires_grad:
            total = loss.reshape(()) * len(inputs) if self._mean else loss.reshape(())
            (found,) = torch.autograd.grad(total, [leaf], allow_unused=True)
        if found is None:
            raise ValueError(
                f"{self._caller}: the loss does not depend on the inputs in a way that can be differentiated (does the "
                "model round, detach or convert them?)"
            )
        if not torch.isfinite(found).all():
            raise ValueError(
                f"{self._caller}: the gradient with respect to the inputs holds NaN or infinity though the loss is "
                "finite (a square root or norm at 0, or an overflow of its type)"
            )
        return found

    @torch.no_grad()
    def output(self, inputs: Tensor) -> Any:
        """What the model returns, without a graph."""
        return self._call(inputs, None, with_loss=False)

    def forward(self, inputs: Tensor, targets: Any, with_loss: bool) -> Any:
        """Called with the stand-ins in place."""
        output = self.model(inputs)
        return self._loss_fn(output, targets) if with_loss else output

    def _call(self, inputs: Tensor, targets: Any, *, with_loss: bool) -> Any:
        values = {name: parameter.detach() for name, parameter in self.named_parameters()}
        values |= {name: buffer.detach().clone() for name, buffer in self.named_buffers()}
        if self._device is not None:
            inputs, targets = inputs.to(self._device), to_device(targets, self._device)
        return call_with(self, values, (inputs, targets, with_loss))

    def _culprit(self, targets: Any) -> str:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        found = [name for name, tensor in named if not torch.isfinite(tensor.detach()).all()]
        if found:
            return f"the model holds NaN or infinity in {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        if isinstance(targets, Tensor) and not torch.isfinite(targets).all():
            return "the targets hold NaN or infinity"
        return "model and data are finite, so that the forward or the loss overflows or divides by zero"
