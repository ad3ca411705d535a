"""The optimizers of `kronfac train`, one entry each: what it is built from, with which options and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from kronfac.cli.errors import UsageError, one_line

Build: TypeAlias = Callable[[nn.Module, dict[str, Any], int, "int | None"], torch.optim.Optimizer]


@dataclass(frozen=True)
class Entry:
    """An optimizer.

    Attributes:
        summary: one line, for the help.
        options: the options that it takes with their defaults; all others are refused.
        build: builds it from the model whose parameters to train, a value for every option, a seed, and the number of
            examples.
        closure: whether a step evaluates the loss on examples of its own choice, and is not one of gradients in `.grad`
            with a learning rate.
    """

    summary: str
    options: Mapping[str, Any]
    build: Build
    closure: bool = False


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizers that know nothing of layers train."""
    return [p for p in model.parameters() if p.requires_grad]


def _torch(name: str, **fixed: Any) -> Build:
    def build(model: nn.Module, options: dict[str, Any], seed: int, examples: int | None) -> torch.optim.Optimizer:
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        kind: type[torch.optim.Optimizer] = getattr(torch.optim, name)
        return kind(parameters(model), **options, **fixed)

    return build


def _kfac(**fixed: Any) -> Build:
    def build(model: nn.Module, options: dict[str, Any], seed: int, examples: int | None) -> torch.optim.Optimizer:
        from kronfac.optim import KFAC

        return KFAC(model, options.pop("lr"), **options, **fixed, seed=seed)

    return build


def _newton(name: str, **other_names: str) -> Build:
    """Of `kronfac.optim.newton`; keyword arguments that are called otherwise there, by their name here."""

    def build(model: nn.Module, options: dict[str, Any], seed: int, examples: int | None) -> torch.optim.Optimizer:
        from kronfac.optim import newton

        del options["steps_per_epoch"]
        if options["curvature"] != "fisher":
            del options["likelihood"]
        arguments = {other_names.get(key, key): value for key, value in options.items()}
        kind: Callable[..., torch.optim.Optimizer] = getattr(newton, name)
        return kind(parameters(model), examples=examples, seed=seed, **arguments)

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
_NEWTON = {
    "steps_per_epoch": 1,
    "curvature": "hessian",
    "likelihood": "categorical",
    "gradient_sample": None,
    "hessian_sample": None,
    "ratio_sample": None,
    "chunk_size": None,
    "tolerance": None,
    "max_iterations": 250,
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
    "trcg": Entry(
        "trust-region Newton-CG",
        {**_NEWTON, "radius": 5.0, "max_radius": 20.0, "radius_rule": "xu"},
        _newton("TRCG"),
        closure=True,
    ),
    "newton-minres": Entry(
        "Newton by MINRES",
        {**_NEWTON, "ratio_sample": "gradient", "tolerance": 0.1},
        _newton("NewtonMINRES", ratio_sample="line_search_sample"),
        closure=True,
    ),
    "cubic-newton": Entry(
        "Newton with cubic regularisation", {**_NEWTON, "sigma": 0.2}, _newton("CubicNewton"), closure=True
    ),
    "gauss-newton-cg": Entry(
        "Hessian-free Gauss-Newton",
        {**_NEWTON, "curvature": "ggn", "damping": 1.0},
        _newton("GaussNewtonCG"),
        closure=True,
    ),
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
        """Learning rate.

        Raises:
            KeyError: an optimizer without one.
        """
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


def make_optimizer(
    settings: Settings, model: nn.Module, seed: int, examples: int | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer.

    Args:
        settings: what to build.
        model: whose parameters to train.
        seed: of the generators that the optimizer owns, K-FAC's target sampler for one.
        examples: how many there are, for optimizers that choose among them.

    Raises:
        UsageError: a hyper-parameter that the optimizer refuses.
    """
    try:
        return OPTIMIZERS[settings.optimizer].build(model, dict(settings.options), seed, examples)
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from None
