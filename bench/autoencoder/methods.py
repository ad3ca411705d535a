"""The optimizers, and what the race does to them at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import kronfac
from bench.autoencoder.problem import L2
from bench.autoencoder.settings import Setting

HOLD = 0.5
"""Share of the steps during which the rates are held."""


class UnavailableError(Exception):
    """The installed kronfac refuses the method as not being there yet; the message is its own."""


def make(setting: Setting, network: nn.Module, seed: int) -> Optimizer:
    """The optimizer of a setting.

    Raises:
        UnavailableError: kronfac does not have what the setting asks for yet.
    """
    options = setting.options
    if setting.method == "sgd":
        return torch.optim.SGD(
            network.parameters(), options["lr"], momentum=0.5, nesterov=True, weight_decay=L2, fused=True
        )
    if setting.method == "adam":
        return torch.optim.Adam(network.parameters(), options["lr"], weight_decay=L2, fused=True)
    arguments: dict[str, Any] = {"likelihood": "bernoulli", "weight_decay": L2, "seed": seed, **options}
    if setting.method == "kfac-adaptive":
        arguments |= {"lr": None, "adaptive": True}
    elif setting.method == "ekfac":
        arguments["structure"] = "ekfac"
    try:
        return kronfac.KFAC(network, **arguments)
    except ValueError as error:
        if "not available yet" in str(error):
            raise UnavailableError(str(error)) from None
        raise


def period(setting: Setting) -> int:
    """Steps after which the costs of a step repeat themselves."""
    return math.lcm(setting.options.get("factor_every", 1), setting.options.get("inverse_every", 1))


def rate_factor(step: int, steps: int) -> float:
    """The schedule of all methods: 1 for the first half of the steps, then linearly to 0."""
    held = HOLD * steps
    return 1.0 if step < held else max(0.0, (steps - step) / (steps - held))


def momentum_at(step: int, limit: float) -> float:
    """Momentum of SGD at a step, min(1 - 2^(-1 - log2(⌊step/250⌋ + 1)), limit) (Sutskever et al. 2013, equation 5)."""
    return min(1 - 0.5 / (step // 250 + 1), limit)


class Stepper:
    """Makes the steps of one setting.

    Args:
        setting: what to run.
        optimizer: as `make` made it for that setting.
        steps: how many steps the schedule is laid out for.
    """

    def __init__(self, setting: Setting, optimizer: Optimizer, steps: int) -> None:
        self._optimizer, self._steps = optimizer, steps
        self._options = setting.options
        self._closure_wanted = setting.method == "kfac-adaptive"
        self._momentum_limit = setting.options.get("max_momentum")

    def step(self, number: int, loss: Callable[[], torch.Tensor]) -> float:
        """Make step `number` (0-based) on the batch whose loss the callable evaluates; returns the loss before it."""
        self._schedule(number)
        if self._closure_wanted:  # no rate of the user's, so nothing to schedule; the closure may be called again
            values: list[float] = []

            def closure() -> float:
                self._optimizer.zero_grad()
                value = loss()
                value.backward()
                values.append(value.item())
                return values[-1]

            self._optimizer.step(closure)
            return values[0]
        self._optimizer.zero_grad()
        value = loss()
        value.backward()
        self._optimizer.step()
        return value.item()

    def _schedule(self, number: int) -> None:
        factor = rate_factor(number, self._steps)
        for group in self._optimizer.param_groups:
            if "lr" in self._options:
                group["lr"] = self._options["lr"] * factor
            if self._options.get("kl_clip") is not None:  # bounds the square of the step's length
                group["kl_clip"] = max(self._options["kl_clip"] * factor**2, 1e-12)
            if self._momentum_limit is not None:
                group["momentum"] = momentum_at(number, self._momentum_limit)
