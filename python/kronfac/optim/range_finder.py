"""Which learning rate or damping: short trials over a geometric range, after which nothing has happened."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronfac._plotting import axes_or_new
from kronfac.operators.isolation import RandomStreams, accelerator_devices
from kronfac.optim import options
from kronfac.optim.kfac import KFAC
from kronfac.optim.monitor import Monitor
from kronfac.optim.report import Reporter

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class RangeResult:
    """What trials over a range of one option showed.

    Attributes:
        option: what was varied, "lr", "damping" or "kl_clip".
        values: the values tried, ascending (m,), float64.
        losses: mean training loss over the later half of each trial's batches (m,), float64; infinite where a loss was
            not finite or a step was skipped.
        start: the mean loss over the same batches without any step.
        clipped: share of the steps in which the KL clip shortened the step (m,); 0 without a clip.
        suggestion: the value of least loss, the smallest of equal ones; None where no value came below `start`.
    """

    option: str
    values: Tensor
    losses: Tensor
    start: float
    clipped: Tensor
    suggestion: float | None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the loss against the values; hollow marks are trials in which the KL clip acted in most steps.

        Args:
            ax: axes to draw on; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "RangeResult.plot")
        finite, held = self.losses.isfinite(), self.clipped > 0.5
        values, losses = self.values.numpy(), self.losses.numpy()
        axes.plot(values[finite.numpy()], losses[finite.numpy()], color="C0", linewidth=1.0, zorder=1)
        for mask, face, label in ((finite & ~held, "C0", "free"), (finite & held, "white", "KL clip acts")):
            if bool(mask.any()):
                chosen = mask.numpy()
                axes.plot(values[chosen], losses[chosen], "o", color="C0", markerfacecolor=face, label=label)
        axes.axhline(self.start, color="0.5", linewidth=0.8, linestyle="--", label="no step")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="C1", linewidth=1.0, label=f"{self.suggestion:.3g}")
        axes.set_xscale("log")
        axes.set_xlabel(self.option)
        axes.set_ylabel("training loss")
        axes.legend()
        return axes  # type: ignore[no-any-return]


def range_finder(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    *,
    option: str = "lr",
    low: float = 1e-4,
    high: float = 10.0,
    count: int = 11,
    steps: int = 10,
) -> RangeResult:
    """Try values of one option, each from the same point over the same batches, and put everything back.

    Each trial starts from the present weights and optimizer state, sets the option in all param groups, and takes
    `steps` steps. For "damping", inverses are renewed in every step of a trial, so that the value acts at once. A
    trial's loss is that of batches not yet trained on in it. The cost is count · steps training steps, and memory for
    one more copy of weights and state.

    Afterwards weights, buffers, ``.grad``, the optimizer's state and groups, and all random streams are bit for bit
    what they were, also when something is raised. Call it between steps: statistics that no step has committed are
    dropped. Monitors do not see the trials; other hooks on the optimizer's step do.

    While KFAC's KL clip acts, lr has no effect; `RangeResult.clipped` shows where. For the lr of KFAC without the clip
    set ``kl_clip`` of the param groups to None before.

    Args:
        model: in the mode in which it is trained.
        optimizer: of the model; KFAC, or for "lr" any other of torch.
        loss_fn: ``loss_fn(model(inputs), targets) -> scalar``.
        data: yields pairs (inputs, targets); the first `steps` are used.
        option: "lr", "damping" or "kl_clip".
        low: smallest value, > 0.
        high: largest value.
        count: how many values, in equal ratios, >= 2.
        steps: of each trial, >= 2.

    Returns:
        The result, with ``.plot()``.

    Raises:
        TypeError: `optimizer` or an element of `data` has the wrong type.
        ValueError: an option outside its range, one that is a callable of the step, or fewer than `steps` batches.
    """
    where = "range_finder"
    options.choice(f"{where}: option", option, ("lr", "damping", "kl_clip"))
    if not isinstance(optimizer, Optimizer) or (option != "lr" and not isinstance(optimizer, KFAC)):
        wanted = "a torch optimizer" if option == "lr" else f"a kronfac.KFAC for option={option!r}"
        raise TypeError(f"{where}: optimizer: expected {wanted}, got a {type(optimizer).__name__}")
    least = options.number(f"{where}: low", low, open_low=True)
    most = options.number(f"{where}: high", high, low=least, open_low=True)
    values = torch.logspace(
        math.log10(least), math.log10(most), options.integer(f"{where}: count", count, low=2), dtype=torch.float64
    )
    length = options.integer(f"{where}: steps", steps, low=2)
    if isinstance(optimizer, KFAC):
        for index, schedules in enumerate(optimizer._schedules):
            for name in {option, *(["inverse_every"] if option == "damping" else [])} & set(schedules):
                raise ValueError(
                    f"{where}: params[{index}]: {name}: expected a number, got a callable of the step, which would "
                    "overwrite every value tried; make a KFAC with a number for this"
                )
    with _untouched(model, optimizer, data) as base:
        batches = _batches(where, data, length)
        start = _mean_loss(model, loss_fn, batches[length // 2 :])
        losses, clipped = [], []
        for value in values.tolist():
            base.restore()
            loss, share = _trial(model, optimizer, loss_fn, batches, {option: value})
            losses.append(loss)
            clipped.append(share)
    found = torch.tensor(losses, dtype=torch.float64)
    best = int(found.argmin())
    suggestion = float(values[best]) if losses[best] < start else None
    return RangeResult(option, values, found, start, torch.tensor(clipped, dtype=torch.float64), suggestion)


def _batches(where: str, data: Iterable[Any], count: int) -> list[tuple[Any, Any]]:
    batches: list[tuple[Any, Any]] = []
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"{where}: data: expected pairs (inputs, targets), got a {type(batch).__name__}")
        batches.append((batch[0], batch[1]))
        if len(batches) == count:
            return batches
    raise ValueError(f"{where}: data: expected at least steps={count} batches, got {len(batches)}")


def _trial(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Sequence[tuple[Any, Any]],
    chosen: dict[str, float],
) -> tuple[float, float]:
    """Mean loss over the later half of the batches, each before the step on it, and the share of clipped steps."""
    for group in optimizer.param_groups:
        group.update(chosen)
        if "damping" in chosen:
            group["inverse_every"] = 1
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    late, clipped = [], 0
    skipped = optimizer.skipped_steps if isinstance(optimizer, KFAC) else 0
    for index, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_fn(model(_move(inputs, device)), _move(targets, device))
        if not bool(loss.isfinite()):
            return math.inf, clipped / (index or 1)
        torch.autograd.backward(loss)
        optimizer.step()
        if isinstance(optimizer, KFAC):
            if optimizer.skipped_steps > skipped:
                return math.inf, clipped / (index or 1)
            clipped += any(scale is not None and float(scale) < 1 for scale in optimizer.clip_scales)
        if index >= len(batches) // 2:
            late.append(float(loss.detach()))
    return sum(late) / len(late), clipped / len(batches)


def _mean_loss(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batches: Sequence[tuple[Any, Any]]) -> float:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        losses = [float(loss_fn(model(_move(x, device)), _move(y, device))) for x, y in batches]
    return sum(losses) / len(losses)


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class _State:
    """Weights, buffers, optimizer state and random streams at one moment."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        parameters = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        parameters.update({id(p): p for p in model.parameters()})
        tensors = [*parameters.values(), *model.buffers()]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._saved = copy.deepcopy(optimizer.state_dict())
        self._streams = RandomStreams(accelerator_devices(model))

    def restore(self) -> None:
        """Everything as it was."""
        with torch.no_grad():
            for tensor, saved in self._tensors:
                tensor.copy_(saved)
        self._optimizer.load_state_dict(copy.deepcopy(self._saved))
        self._streams.restore()


@contextmanager
def _untouched(model: nn.Module, optimizer: Optimizer, data: Any) -> Iterator[_State]:
    """Yields what `model` and `optimizer` are now; afterwards they, and the random streams of the data, are that."""
    owners = (data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    streams = RandomStreams(
        accelerator_devices(model), tuple({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())
    )
    base = _State(model, optimizer)
    parameters = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    parameters.update({id(p): p for p in model.parameters()})
    grads = [(p, p.grad) for p in parameters.values()]
    for p, _ in grads:
        p.grad = None
    try:
        with _in_silence(optimizer):
            yield base
    finally:
        base.restore()
        for p, grad in grads:
            p.grad = grad
        streams.restore()


@contextmanager
def _in_silence(optimizer: Optimizer) -> Iterator[None]:
    """KFAC warns of nothing inside, shows nothing, and remembers neither trials' clips nor their times."""
    if not isinstance(optimizer, KFAC):
        yield
        return
    clips, norms = list(optimizer.clip_scales), list(optimizer.norm_scales)
    reporter, clock = optimizer._reporter, optimizer._clock
    hooks = optimizer._optimizer_step_post_hooks
    kept = dict(hooks)
    recorder = optimizer._live_recorder()
    optimizer._reporter, optimizer._clock, recorder.clock = _Mute(), None, None
    for key, hook in kept.items():
        if isinstance(getattr(hook, "__self__", None), Monitor):
            del hooks[key]
    try:
        yield
    finally:
        optimizer.clip_scales[:], optimizer.norm_scales[:] = clips, norms
        optimizer._reporter, optimizer._clock = reporter, clock
        recorder = optimizer._live_recorder()
        recorder.clock = clock
        recorder.rows.take()  # of a trial that ended between forward and step
        hooks.clear()
        hooks.update(kept)


class _Mute(Reporter):
    """Says nothing: values that go too far are what trials are for."""

    def once(self, key: str, text: str) -> None:
        """Nothing."""
