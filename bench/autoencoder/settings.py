"""What is raced: the methods, and the settings each of them is tuned over. Plain data, nothing heavy is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
"""Units per layer of the network; the narrowest is the code."""

FIRST_ORDER = ("sgd", "adam")
"""The methods whose best final error is the line that K-FAC has to cross."""

TITLES = {
    "sgd": "SGD + Nesterov",
    "adam": "Adam",
    "kfac": "K-FAC",
    "kfac-adaptive": "K-FAC, adaptive",
    "ekfac": "EKFAC",
}
"""Methods in the order of tables, and what they are called there."""


@dataclass(frozen=True)
class Setting:
    """One way to run one method.

    Attributes:
        method: a key of `TITLES`.
        batch: examples per step.
        options: what the method's optimizer is made with, as `methods.make` reads it.
    """

    method: str
    batch: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name for files: the method and a digest of everything else."""
        text = json.dumps([self.batch, self.options], sort_keys=True)
        return f"{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def describe(self) -> str:
        """The setting in one line, for people."""
        parts = [f"batch {self.batch}"]
        parts += [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.options.items()
        ]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"method": self.method, "batch": self.batch, "options": self.options}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Setting:
        """The inverse of `to_json`."""
        return Setting(data["method"], data["batch"], data["options"])


FIRST_ORDER_BATCH = 200


def _sgd(rate: float, max_momentum: float) -> Setting:
    return Setting("sgd", FIRST_ORDER_BATCH, {"lr": rate, "max_momentum": max_momentum})


def _adam(rate: float, batch: int = FIRST_ORDER_BATCH) -> Setting:
    return Setting("adam", batch, {"lr": rate})


def _kfac(
    batch: int,
    damping: float,
    *,
    momentum: float = 0.8,
    kl_clip: float = 0.3,
    lr: float = 0.3,
    every: tuple[int, int] = (5, 20),
    method: str = "kfac",
) -> Setting:
    # While the clip is active, through most of a run, √kl_clip / (1 - momentum) is the step and lr has no effect.
    step = {"lr": lr, "damping": damping, "kl_clip": kl_clip, "momentum": momentum}
    return Setting(method, batch, {**step, "factor_every": every[0], "inverse_every": every[1]})


def _adaptive(batch: int, damping: float) -> Setting:
    # What it starts with: 150 in Martens & Grosse, from where it takes over 100 steps to come down to 1.
    return Setting("kfac-adaptive", batch, {"damping": damping, "factor_every": 5, "inverse_every": 20})


GRID: dict[str, list[Setting]] = {
    "sgd": [
        *(_sgd(rate, 0.99) for rate in (0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.064)),
        *(_sgd(rate, 0.995) for rate in (0.008, 0.016)),
        *(_sgd(rate, 0.98) for rate in (0.032, 0.064)),
        _sgd(0.048, 0.99),
    ],
    "adam": [
        *(_adam(rate) for rate in (1e-4, 2e-4, 4e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 3e-3, 4e-3)),
        *(_adam(rate, 100) for rate in (1e-3, 2e-3)),
        *(_adam(rate, 500) for rate in (2e-3, 4e-3)),
    ],
    "kfac": [
        _kfac(1000, 0.03),
        _kfac(500, 0.03),
        _kfac(2000, 0.03),
        _kfac(1000, 0.1),
        _kfac(1000, 0.03, momentum=0.6, kl_clip=1.0),
        _kfac(500, 0.03, momentum=0.6, kl_clip=1.0),
        _kfac(500, 0.03, lr=1.0),
        _kfac(1000, 0.03, momentum=0.9, kl_clip=0.1),
        _kfac(500, 0.01),
        _kfac(500, 0.003),
        _kfac(500, 0.003, every=(10, 50)),
        _kfac(500, 0.001, every=(10, 50)),
        _kfac(250, 0.003, every=(10, 50)),
    ],
    "kfac-adaptive": [_adaptive(1000, 150.0), _adaptive(1000, 15.0), _adaptive(1000, 1.5), _adaptive(500, 1.5)],
    # Its damping is exact, which for the same number damps less than K-FAC's factored one.
    "ekfac": [
        _kfac(batch, damping, every=(5, 50), method="ekfac")
        for batch, damping in ((1000, 0.03), (1000, 0.1), (1000, 0.3), (500, 0.1))
    ],
}
"""The tuning runs of each method."""


def grid(methods: Sequence[str]) -> list[Setting]:
    """The tuning runs of the methods, in the order in which they are run.

    Raises:
        ValueError: a method that is not in `TITLES`.
    """
    unknown = [method for method in methods if method not in TITLES]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: expected some of {', '.join(TITLES)}")
    return [setting for method in methods for setting in GRID[method]]
