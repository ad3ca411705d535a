"""The optimizers of `kronfac train`, one entry each: what it is built from, with which options and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from kronfac.cli.errors import UsageError, one_line

Build: TypeAlias = Callable[[nn.Module, dict[str, Any], int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Entry:
    """An optimizer.

    Attributes:
        summary: one line, for the help.
        options: the options that it takes with their defaults; all others are refused.
        build: builds it from the model whose parameters to train, a value for every option, and a seed.
    """

    summary: str
    options: Mapping[str, Any]
    build: Build


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizers that know nothing of layers train."""
    return [p for p in model.parameters() if p.requires_grad]


def _torch(name: str, **fixed: Any) -> Build:
    def build(model: nn.Module, options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        kind: type[torch.optim.Optimizer] = getattr(torch.optim, name)
        return kind(parameters(model), **options, **fixed)

    return build


def _kfac(**fixed: Any) -> Build:
    def build(model: nn.Module, options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
        from kronfac.optim import KFAC

        return KFAC(model, options.pop("lr"), **options, **fixed, seed=seed)

    return build


_MOMENTUM = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0}
_ADAM = {"lr": 0.003, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
_EKFAC = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "damping": 1e-2,
    "kl_clip": 1e-4,
    "fisher": "mc",
    "likelihood": "categorical",
    "factor_every": 1,
    "inverse_every": 10,
}

OPTIMIZERS: dict[str, Entry] = {
    "kfac": Entry("K-FAC", {**_EKFAC, "solve": "inverse"}, _kfac()),
    "ekfac": Entry("K-FAC with measured eigenvalues", _EKFAC, _kfac(structure="ekfac")),
    "sgd": Entry("SGD with momentum", _MOMENTUM, _torch("SGD")),
    "momentum": Entry("the same as sgd", _MOMENTUM, _torch("SGD")),
    "nesterov": Entry("SGD with Nesterov's momentum", _MOMENTUM, _torch("SGD", nesterov=True)),
    "rmsprop": Entry(
        "RMSProp",
        {"lr": 0.003, "alpha": 0.99, "momentum": 0.0, "eps": 1e-8, "weight_decay": 0.0},
        _torch("RMSprop"),
    ),
    "adam": Entry("Adam", _ADAM, _torch("Adam")),
    "nadam": Entry("Adam with Nesterov's momentum", {**_ADAM, "momentum_decay": 4e-3}, _torch("NAdam")),
}


class Settings:
    """An optimizer and a value for each of its options; compares by value.

    Args:
        optimizer: a name in `OPTIMIZERS`.
        lr: learning rate; None for the default.
        options: other options of this optimizer; the defaults of the table stand for what is left out.

    Raises:
        UsageError: unknown optimizer, or an option that it does not have.
    """

    def __init__(self, optimizer: str, lr: float | None = None, **options: Any) -> None:
        if optimizer not in OPTIMIZERS:
            raise UsageError(f"unknown optimizer {optimizer!r}: expected {', '.join(OPTIMIZERS)}")
        if lr is not None:
            options["lr"] = lr
        known = OPTIMIZERS[optimizer].options
        for name in options:
            if name not in known:
                raise UsageError(f"{optimizer} has no option {name!r}: expected {', '.join(known)}")
        self.optimizer = optimizer
        self.options: dict[str, Any] = {**known, **options}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and (self.optimizer, self.options) == (other.optimizer, other.options)

    @property
    def lr(self) -> float:
        """Learning rate."""
        return float(self.options["lr"])

    @property
    def momentum(self) -> float:
        """Momentum."""
        return float(self.options["momentum"])

    @property
    def damping(self) -> float | None:
        """λ, or None where there is none."""
        return self.options.get("damping")

    def used(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        plain = dict(self.options)
        if not isinstance(plain.get("likelihood", ""), str):
            plain["likelihood"] = repr(plain["likelihood"])
        return {"optimizer": self.optimizer, **plain}


def make_optimizer(settings: Settings, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Build the optimizer.

    Args:
        settings: what to build.
        model: whose parameters to train.
        seed: of the generators that the optimizer owns, K-FAC's target sampler for one.

    Raises:
        UsageError: a hyper-parameter that the optimizer refuses.
    """
    try:
        return OPTIMIZERS[settings.optimizer].build(model, dict(settings.options), seed)
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from None
