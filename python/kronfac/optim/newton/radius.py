"""How the radius of a trust region follows the ratio of the true to the promised decrease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

XU = "xu"
CLASSICAL = "classical"


@dataclass(frozen=True)
class XuRule:
    """Xu, Roosta & Mahoney (arXiv:1708.07827, algorithm 1): every step that is taken lets the radius grow.

    Attributes:
        maximum: of the radius.
        eta1: from this ratio on the radius grows by `gamma1`.
        eta2: below this ratio a step is rejected.
        gamma1: the large factor, also of the decrease.
        gamma2: the small one.
    """

    maximum: float
    eta1: float = 0.8
    eta2: float = 1e-4
    gamma1: float = 2.0
    gamma2: float = 1.2

    def accepts(self, ratio: float) -> bool:
        """Whether a step is taken."""
        return ratio >= self.eta2

    def accepted(self, radius: float, ratio: float, *, at_boundary: bool) -> float:
        """The radius after a step that was taken."""
        return min(self.maximum, radius * (self.gamma1 if ratio >= self.eta1 else self.gamma2))

    def rejected(self, radius: float) -> float:
        """The radius after a step that was not."""
        return radius / self.gamma1


@dataclass(frozen=True)
class ClassicalRule:
    """Nocedal & Wright (Numerical Optimization, 2nd ed., algorithm 4.1): it grows only where the region was in the way.

    Attributes:
        maximum: of the radius.
        eta2: below this ratio a step is rejected.
    """

    maximum: float
    eta2: float = 1e-4

    def accepts(self, ratio: float) -> bool:
        """Whether a step is taken."""
        return ratio >= self.eta2

    def accepted(self, radius: float, ratio: float, *, at_boundary: bool) -> float:
        """The radius after a step that was taken."""
        if ratio < 0.25:
            return radius / 4
        return min(self.maximum, 2 * radius) if ratio > 0.75 and at_boundary else radius

    def rejected(self, radius: float) -> float:
        """The radius after a step that was not."""
        return radius / 4


def rule_from(options: Mapping[str, Any], where: str) -> XuRule | ClassicalRule:
    """The rule that checked options ask for.

    Raises:
        ValueError: options of the other rule, or thresholds or factors in the wrong order.
    """
    own = {name: options[name] for name in ("eta1", "gamma1", "gamma2") if options[name] is not None}
    if options["radius_rule"] == CLASSICAL:
        if own:
            name, value = next(iter(own.items()))
            raise ValueError(
                f"{where}: {name}: expected None with radius_rule={CLASSICAL!r}, whose values are fixed, got {value}"
            )
        return ClassicalRule(options["max_radius"], options["eta2"])
    rule = XuRule(options["max_radius"], eta2=options["eta2"], **own)
    if rule.eta1 < rule.eta2:
        raise ValueError(f"{where}: eta1: expected at least eta2={rule.eta2}, got {rule.eta1}")
    if rule.gamma1 < rule.gamma2:
        raise ValueError(f"{where}: gamma1: expected at least gamma2={rule.gamma2}, got {rule.gamma1}")
    return rule
