"""The training loop that `kronfac train` and `kronfac demo` share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kronfac.cli.errors import UsageError, one_line
from kronfac.cli.problems import Loader, LossFunction, count_examples, to_device

if TYPE_CHECKING:
    from kronfac.curvature import Likelihood

KFAC_DAMPING = 1e-2


@dataclass(frozen=True)
class Settings:
    """An optimizer and its hyper-parameters; the K-FAC ones are None or ignored for SGD.

    Attributes:
        optimizer: "sgd" (torch.optim.SGD) or "kfac" (kronfac.KFAC).
        lr: learning rate, constant.
        momentum: momentum.
        weight_decay: L2 coefficient.
        damping: λ.
        kl_clip: κ, or None to switch it off.
        fisher: "mc", "exact" or "empirical".
        likelihood: "categorical", "gaussian", "bernoulli", or an object of `kronfac.curvature.Likelihood`.
        solve: "inverse" or "eigen".
        factor_every: steps between statistics.
        inverse_every: steps between inversions.
    """

    optimizer: str
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    damping: float | None = None
    kl_clip: float | None = None
    fisher: str = "mc"
    likelihood: str | Likelihood = "categorical"
    solve: str = "inverse"
    factor_every: int = 1
    inverse_every: int = 10

    def used(self) -> dict[str, Any]:
        """The settings that the optimizer reads, as plain data."""
        names = ("optimizer", "lr", "momentum", "weight_decay")
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["likelihood"] = self.likelihood if isinstance(self.likelihood, str) else repr(self.likelihood)
        return {name: value for name, value in plain.items() if self.optimizer == "kfac" or name in names}


def make_optimizer(settings: Settings, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Build the optimizer.

    Args:
        settings: what to build.
        model: whose parameters to train.
        seed: of K-FAC's target sampler.

    Raises:
        UsageError: a hyper-parameter that the optimizer refuses.
    """
    try:
        if settings.optimizer == "sgd":
            return torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad],
                lr=settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )
        if settings.optimizer == "kfac":
            from kronfac.optim import KFAC

            return KFAC(
                model,
                settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                damping=KFAC_DAMPING if settings.damping is None else settings.damping,
                likelihood=settings.likelihood,
                fisher=settings.fisher,
                solve=settings.solve,
                factor_every=settings.factor_every,
                inverse_every=settings.inverse_every,
                kl_clip=settings.kl_clip,
                seed=seed,
            )
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from None
    raise UsageError(f"unknown optimizer {settings.optimizer!r}: expected sgd or kfac")


def train_epoch(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Loader,
    optimizer: torch.optim.Optimizer,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[float, int, float]:
    """Go through the batches once.

    Args:
        model: trained in place, in training mode.
        loss_fn: averaged over the batch.
        batches: (inputs, targets) pairs.
        optimizer: steps once per batch.
        on_step: called with the batch's loss after every step (for progress bars; its time is not counted).

    Returns:
        The mean of the batch losses weighted by examples, the number of steps, and the seconds they took (loading
        included). The loss is NaN or infinite, and the epoch cut short, as soon as one batch's is.
    """
    model.train()
    device = next(model.parameters()).device
    total, examples, steps, seconds = 0.0, 0, 0, 0.0
    start = time.perf_counter()
    for inputs, targets in batches:
        inputs, targets = to_device(inputs, device), to_device(targets, device)
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = loss.item()
        count = count_examples(targets)
        total += value * count
        examples += count
        steps += 1
        seconds += time.perf_counter() - start
        on_step(value)
        if not abs(value) < float("inf"):
            return value, steps, seconds
        start = time.perf_counter()
    if examples == 0:
        raise UsageError("the training loader yields no batch")
    return total / examples, steps, seconds


@torch.no_grad()
def evaluate(model: nn.Module, loss_fn: LossFunction, batches: Loader) -> tuple[float, float | None]:
    """Mean loss and accuracy over all examples, in evaluation mode; the model's mode is restored.

    Accuracy is None unless the outputs are (N, classes) and the targets (N,) integers.
    """
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        total, correct, examples = 0.0, 0, 0
        classified = True
        for inputs, targets in batches:
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            outputs = model(inputs)
            count = count_examples(targets)
            total += loss_fn(outputs, targets).item() * count
            examples += count
            hits = _hits(outputs, targets)
            classified = classified and hits is not None
            correct += hits or 0
    finally:
        model.train(was_training)
    if examples == 0:
        raise UsageError("a loader yields no batch")
    return total / examples, correct / examples if classified else None


def _hits(outputs: Any, targets: Any) -> int | None:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
        return None
    return int((outputs.argmax(dim=1) == targets).sum())
