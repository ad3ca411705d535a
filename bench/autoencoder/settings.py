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
KFAC_BATCH = 1000
_REFRESH = {"factor_every": 5, "inverse_every": 20}


def _sgd(rate: float, max_momentum: float) -> Setting:
    return Setting("sgd", FIRST_ORDER_BATCH, {"lr": rate, "max_momentum": max_momentum})


def _adam(rate: float) -> Setting:
    return Setting("adam", FIRST_ORDER_BATCH, {"lr": rate})


def _kfac(method: str, lr: float, damping: float, kl_clip: float | None, batch: int = KFAC_BATCH) -> Setting:
    return Setting(method, batch, {"lr": lr, "damping": damping, "kl_clip": kl_clip, "momentum": 0.9, **_REFRESH})


def _adaptive(damping: float, batch: int) -> Setting:
    return Setting("kfac-adaptive", batch, {"damping": damping, **_REFRESH})


GRID: dict[str, list[Setting]] = {
    "sgd": [_sgd(rate, 0.99) for rate in (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)],
    "adam": [_adam(rate) for rate in (1e-4, 2e-4, 4e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 4e-3)],
    "kfac": [_kfac("kfac", 0.3, 0.1, 0.1)],
    "kfac-adaptive": [_adaptive(150.0, KFAC_BATCH)],
    "ekfac": [_kfac("ekfac", 0.3, 0.1, 0.1)],
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
