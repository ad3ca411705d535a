"""What is compared: the methods, and all that they have in common. Plain data, nothing heavy is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

TITLES = {
    "bl": "BL",
    "fb": "FB",
    "gg": "GG",
    "abs": "ABS",
    "absa": "ABSA",
}
"""Methods in the order of tables, and what they are called there."""

ADAPTIVE = ("abs", "absa")
"""Those that compute eigenvalues while they train."""


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison have in common; the defaults are what is published.

    Attributes:
        examples: of the training split, the first ones.
        epochs: in all.
        batches: B, the batch sizes that are compared.
        base_batch: that `lr` belongs to, and where the growing methods begin.
        seeds: of the initial weights and of the order of the examples.
        lr: base rate of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        decay_epochs: epochs before which the rate decays.
        decay: the factor.
        warmup_epochs: of FB.
        duration: epochs after which ABS and ABSA grow anyway.
        share: of FGSM examples in a small batch of ABSA, at first.
        eps: of FGSM, in training and at the end, in units of pixels in [0, 1].
        small_batch: the most examples of one forward and backward.
        eigen_examples: that the eigenvalues in training are averaged over.
        eigen_tolerance: of their residual, relative.
        final_examples: that the eigenvalue at the end is averaged over.
        final_tolerance: of its residual, relative.
        pgd_examples: of the test split, the first ones, that PGD is tried on.
    """

    examples: int = 60_000
    epochs: int = 16
    batches: tuple[int, ...] = (256, 1024, 4096, 16384)
    base_batch: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_epochs: tuple[int, ...] = (6, 11)
    decay: float = 0.2
    warmup_epochs: int = 4
    duration: int = 2
    share: float = 0.2
    eps: float = 0.1
    small_batch: int = 1024
    eigen_examples: int = 256
    eigen_tolerance: float = 0.1
    final_examples: int = 2048
    final_tolerance: float = 0.01
    pgd_examples: int = 1000

    @property
    def key(self) -> str:
        """A digest of what a single run depends on: runs of other plans are not read."""
        content = {name: value for name, value in asdict(self).items() if name not in ("batches", "seeds")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        content: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return Plan(**content)


@dataclass(frozen=True)
class Setting:
    """One run of a plan.

    Attributes:
        method: a key of `TITLES`.
        batch: B: the batch, or the largest one.
        seed: of weights and order.
    """

    method: str
    batch: int
    seed: int

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.method}-{self.batch}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def all_settings(plan: Plan, methods: Sequence[str]) -> list[Setting]:
    """The runs of some methods, one seed after the other, so that there is something to see early.

    Raises:
        ValueError: a method that is not in `TITLES`.
    """
    unknown = [method for method in methods if method not in TITLES]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: expected some of {', '.join(TITLES)}")
    settings = []
    for seed in plan.seeds:
        if "bl" in methods:
            settings.append(Setting("bl", plan.base_batch, seed))
        settings += [Setting(method, batch, seed) for batch in plan.batches for method in methods]
    return settings
