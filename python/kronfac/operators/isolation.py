"""Running a model for analysis without leaving a trace in it or in any random stream."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from kronfac.operators.convolution import BilinearConvolutions


class RandomStreams:
    """The positions of all random streams a data loader or model may draw from.

    Args:
        devices: accelerator devices whose streams count.
        generators: further generators, such as a DataLoader's own.
    """

    def __init__(self, devices: tuple[torch.device, ...], generators: tuple[torch.Generator, ...] = ()) -> None:
        self._devices = devices
        self._generators = generators
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)
        self._torch = torch.get_rng_state()
        self._device_states = [_get_device_state(device) for device in devices]
        self._generator_states = [generator.get_state() for generator in generators]

    def restore(self) -> None:
        """Put every stream back to where it was."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in zip(self._devices, self._device_states, strict=True):
            _set_device_state(device, state)
        for generator, state in zip(self._generators, self._generator_states, strict=True):
            generator.set_state(state)

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        return (
            not torch.equal(torch.get_rng_state(), self._torch)
            or random.getstate() != self._python
            or not _same(np.random.get_state(legacy=False), self._numpy)
            or any(
                not torch.equal(_get_device_state(device), state)
                for device, state in zip(self._devices, self._device_states, strict=True)
            )
        )

    def now(self) -> RandomStreams:
        """The present positions of the same streams."""
        return RandomStreams(self._devices, self._generators)


def _get_device_state(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def _set_device_state(device: torch.device, state: Tensor) -> None:
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def _same(first: Any, second: Any) -> bool:
    """Equality of numpy's nested state dictionaries, whichever bit generator is installed."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(np.array_equal(first, second))


def accelerator_devices(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices other than the CPU that hold parameters or buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    found = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    return tuple(sorted(found, key=str))


@contextmanager
def preserved_streams(streams: RandomStreams) -> Iterator[None]:
    """Run from the given positions of the random streams, then put them back to where they are now."""
    now = streams.now()
    streams.restore()
    try:
        yield
    finally:
        now.restore()


@contextmanager
def evaluation_mode(*modules: nn.Module, batch_norm: str = "running") -> Iterator[None]:
    """Eval mode for all submodules, then each one's own mode again.

    The flags are set directly: `train()` of a user's class may do more than that.

    Args:
        modules: with all their submodules.
        batch_norm: "batch" leaves batch normalisation in train mode, which normalises by the batch's own statistics.
    """
    everything = [submodule for module in modules for submodule in module.modules()]
    modes = [submodule.training for submodule in everything]
    try:
        for submodule in everything:
            submodule.training = batch_norm == "batch" and isinstance(submodule, _BatchNorm)
        yield
    finally:
        for submodule, mode in zip(everything, modes, strict=True):
            submodule.training = mode


@contextmanager
def differentiable_twice(model: nn.Module, *, convolutions: bool = True) -> Iterator[None]:
    """Gradients on, autocast off, and only kernels that can be differentiated twice.

    Args:
        model: what runs inside.
        convolutions: with `BilinearConvolutions`. They make every call of torch slower, so that who does more than
            running the model enters them around that alone.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with kernels_differentiable_twice(accelerator_devices(model), recurrent=recurrent, convolutions=convolutions):
        yield


@contextmanager
def kernels_differentiable_twice(
    devices: tuple[torch.device, ...], *, recurrent: bool = False, convolutions: bool = True
) -> Iterator[None]:
    """`differentiable_twice` for what runs on the CPU and the given devices, with recurrent layers or without."""
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(device.type for device in devices)}:
            # Curvature from half-precision activations would be noise; the model runs in its parameters' type.
            stack.enter_context(torch.autocast(kind, enabled=False))
        # The fused attention kernels have no double backward.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if convolutions:
            stack.enter_context(BilinearConvolutions())
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # cuDNN's recurrent kernels have none either
        # A TransformerEncoder asks its first layer alone whether gradients are wanted, and hands the others nested
        # tensors, which have none.
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_attention)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def refuse_batch_statistics(model: nn.Module, caller: str, batch_norm: str = "running") -> None:
    """Refuse batch normalisation by the statistics of the batch: it couples the examples of a batch.

    Raises:
        ValueError: there is such a layer.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        name = name or type(module).__name__
        if batch_norm == "batch":
            raise ValueError(
                f'{caller}: batch_norm: "batch" normalises {name} with the statistics of the batch, so that the result '
                "would depend on how the data is cut into batches; pass all the data as one batch (inputs, targets) "
                'that is neither cut nor shared between processes, or batch_norm="running"'
            )
        if module.running_mean is None:
            raise ValueError(
                f"{caller}: model: {name} normalises with the statistics of the batch even in "
                "eval mode (track_running_stats=False), so that the result would depend on how the data is cut into "
                "batches; pass all the data as one batch (inputs, targets), or use running statistics"
            )


def refuse_synchronised_statistics(model: nn.Module, caller: str) -> None:
    """Refuse a layer that takes its statistics over all processes, for "batch": it has no second derivative.

    Raises:
        ValueError: there is such a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f'{caller}: batch_norm: "batch" cannot be had of {name or "the model"}, a SyncBatchNorm, whose '
                'statistics over all processes have no second derivative; use batch_norm="running"'
            )


def refuse_sparse_gradients(model: nn.Module, chosen: Iterable[Tensor], caller: str) -> None:
    """Refuse an embedding with sparse gradients for a chosen parameter: they have no second derivative.

    Raises:
        ValueError: there is such a layer.
    """
    wanted = {id(parameter) for parameter in chosen}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.sparse and id(module.weight) in wanted:
            raise ValueError(
                f"{caller}: model: {name or 'the model'} is an Embedding(sparse=True), whose sparse gradient "
                "cannot be differentiated again; set its attribute sparse = False (the values are the same), or leave "
                "its weight out with params="
            )
