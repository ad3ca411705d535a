"""Kronecker factors of a model over given data, without an optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.extra import ExtraStatistic
from kronfac.curvature.forward import Forward
from kronfac.curvature.hooks import unrecorded
from kronfac.curvature.likelihood import Likelihood
from kronfac.curvature.recorder import Recorder
from kronfac.curvature.registry import find_layers
from kronfac.curvature.statistics import KroneckerFactors, Pending


def factors(
    model: nn.Module,
    data: Any,
    *,
    likelihood: str | Likelihood,
    fisher: str,
    sharing: str = "expand",
    output: Callable[[Any], Tensor] | None = None,
    mask: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor] | None = None,
    fisher_samples: int = 1,
    seed: int = 0,
) -> dict[str, KroneckerFactors]:
    """Undamped factors of every layer that can be covered (Martens & Grosse, arXiv:1503.05671, section 3).

    The model runs in eval mode, like every analysis: the factors do not depend on how the data is cut into batches, nor
    on dropout. Its parameters, ``.grad``, buffers and modes, the random streams of torch, numpy and Python and those of
    a loader are the same afterwards, and an optimizer that watches the model records nothing.

    Args:
        model: the model.
        data: one batch, or an iterable of batches such as a DataLoader or a list. A batch is the inputs alone, or a
            tuple or list (inputs, targets) as loaders yield it; inputs are a tensor, a tuple of positional or a
            mapping of keyword arguments. A list that begins with a tensor is one batch. Batches are moved to the
            model's device.
        likelihood: "categorical", "gaussian", "bernoulli" or a `Likelihood`: what the loss is the negative
            logarithm of.
        fisher: "mc" draws targets from the model, "exact" takes their expectation, "empirical" uses the data's
            targets.
        sharing: "expand" or "reduce": how the positions of a shared layer enter, see `kronfac.KFAC`.
        output: picks the output that parametrises the likelihood from what the model returns.
        mask: from the model's args, kwargs and output to a bool tensor, True for the terms that count.
        fisher_samples: draws per example for "mc".
        seed: of the draws for "mc".

    Returns:
        ``{layer name: KroneckerFactors(A (in[+1], in[+1]), G (out, out))}``, with other shapes for layers in groups,
        embeddings and norms as `KroneckerFactors` says; those of single examples, as `Pending.factors` scales them:
        independent of the batch size and of the reduction of the loss. Layers that the output does not depend on
        are absent.

    Raises:
        ValueError: an unknown option, a model without layers that can be covered, an output or mask that does not
            fit, or no examples.
        TypeError: a batch or an output of the wrong type.
        RuntimeError: no graph can be had, under inference_mode or a torch.func transform.
    """
    layers = find_layers(model)
    if not layers:
        raise ValueError(
            "factors: model: expected at least one trainable layer that an adapter covers, found none; "
            "see kronfac.curvature.register_adapter"
        )
    total = take_statistics(
        model,
        layers,
        data,
        likelihood=likelihood,
        fisher=fisher,
        sharing=sharing,
        output=output,
        mask=mask,
        fisher_samples=fisher_samples,
        seed=seed,
    )
    if total.terms <= 0:
        raise ValueError("factors: data: expected at least one example that counts, got none")
    return total.factors()


def take_statistics(
    model: nn.Module,
    layers: Mapping[str, LayerAdapter],
    data: Any,
    *,
    likelihood: str | Likelihood,
    fisher: str,
    sharing: str,
    output: Callable[[Any], Tensor] | None,
    mask: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor] | None,
    fisher_samples: int,
    seed: int,
    extra: Mapping[str, Mapping[str, ExtraStatistic]] | None = None,
    bare: Collection[str] = (),
) -> Pending:
    """The sums that `factors` are made of, over all the data, with whatever else is to be taken in the same pass.

    Args:
        model: as in `factors`.
        layers: adapters by layer name, at least one.
        data: as in `factors`.
        likelihood: as in `factors`.
        fisher: as in `factors`.
        sharing: as in `factors`.
        output: as in `factors`.
        mask: as in `factors`.
        fisher_samples: as in `factors`.
        seed: as in `factors`.
        extra: further statistics to take of some layers, by layer name and name.
        bare: layers of which A and G are not wanted.

    Returns:
        The sums; layers that the output does not depend on are absent.

    Raises:
        TypeError, ValueError, RuntimeError: as `factors`.
    """
    device = next(iter(layers.values())).weight.device
    recorder = _DataRecorder(
        model,
        layers,
        likelihood=likelihood,
        output=output,
        mask=mask,
        # The targets' gradients have a closed form as well: the factors need no loss function and no weight gradients.
        fisher=fisher,
        fisher_samples=fisher_samples,
        sharing=sharing,
        extra=extra,
        bare=bare,
        generator=torch.Generator(device).manual_seed(seed),
    )
    total = Pending(adapters=recorder.adapters, watched=recorder.extra, bare=recorder.bare)
    try:
        with _untouched(model, data), unrecorded(except_for=recorder), torch.enable_grad():
            for batch in _batches(data):
                inputs, recorder.targets = _split(batch, fisher == "empirical")
                with recorder.record(update_only=True):
                    _call(model, inputs, device)
                pending = recorder.collect()
                total.add(pending.layers, pending.terms, pending.examples)
    finally:
        recorder.remove()
    return total


class _DataRecorder(Recorder):
    """A recorder for which fisher="empirical" means the closed-form gradients at given targets."""

    targets: Tensor | None = None

    def __init__(self, *args: Any, fisher: str, **options: Any) -> None:
        super().__init__(*args, fisher=fisher, **options)
        self._from_backward = False

    def _output_gradients(self, logits: Tensor, forward: Forward) -> Iterator[tuple[Tensor, float]]:
        if self.fisher != "empirical":
            yield from super()._output_gradients(logits, forward)
            return
        assert self.targets is not None
        gradients = self.likelihood.target_gradients(logits, self.targets.to(logits.device), forward.mask)
        yield gradients * self._signs(gradients) if forward.merges else gradients, 1.0


@contextmanager
def _untouched(model: nn.Module, data: Any) -> Iterator[None]:
    """Eval mode inside; afterwards modes, buffers and random streams are what they were."""
    modules = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    owners = (data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    cuda = {p.device.index for p in (*model.parameters(), *model.buffers()) if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in cuda if index is not None)):
        try:
            for module, _ in modules:
                module.training = False  # the flag itself: a train() of the user's may do more
            yield
        finally:
            for module, mode in modules:
                module.training = mode
            with torch.no_grad():
                for buffer, saved in buffers:
                    # Writing counts a version up, and a graph that has saved the buffer would be refused its backward.
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            random.setstate(python)
            np.random.set_state(numpy)


def _batches(data: Any) -> Iterable[Any]:
    if isinstance(data, (Tensor, tuple, Mapping)) or (isinstance(data, list) and data and isinstance(data[0], Tensor)):
        return [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"factors: data: expected a batch or an iterable of batches, got a {type(data).__name__}")
    return data


def _split(batch: Any, with_targets: bool) -> tuple[Any, Tensor | None]:
    pair = isinstance(batch, (tuple, list))
    inputs = batch[0] if pair and batch else batch
    if not with_targets:
        return inputs, None
    if not pair or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(
            f'factors: data: expected batches (inputs, targets) for fisher="empirical", got a {type(batch).__name__}'
            + (f" of length {len(batch)}" if pair else "")
        )
    return inputs, batch[1]


def _call(model: nn.Module, inputs: Any, device: torch.device) -> None:
    if isinstance(inputs, Tensor):
        model(_move(inputs, device))
    elif isinstance(inputs, Mapping):
        model(**{name: _move(value, device) for name, value in inputs.items()})
    elif isinstance(inputs, (tuple, list)):
        model(*(_move(value, device) for value in inputs))
    else:
        raise TypeError(
            f"factors: data: expected inputs as a tensor, a tuple or a mapping of arguments, "
            f"got a {type(inputs).__name__}"
        )


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
