"""What a schedule reads from the eigenvalue computation that it was given."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_TOLERANCE = 0.1  # of a residual relative to its value, where the result does not say whether it converged


@dataclass(frozen=True)
class Reading:
    """A top eigenvalue as it goes into the log.

    Attributes:
        value: the eigenvalue, None where it is not finite.
        residual: ‖Hv - λv‖, None where it is not finite or not told.
        converged: whether the computation says so, or the residual is below a tenth of the value; None for a number.
        products: that were spent, None where not told.
        problem: why no decision may rest on it, None where one may.
    """

    value: float | None
    residual: float | None
    converged: bool | None
    products: int | None
    problem: str | None

    def columns(self) -> dict[str, int | float | str | bool | None]:
        """Of the log."""
        return {
            "eigenvalue": self.value,
            "residual": self.residual,
            "converged": self.converged,
            "products": self.products,
        }


def read(result: Any, caller: str) -> Reading:
    """Read a number, or the first pair of an EigenResult or of something like it.

    Raises:
        TypeError: neither.
        KeyboardInterrupt: one ended the computation.
    """
    if getattr(result, "ended", None) == "interrupted":
        raise KeyboardInterrupt
    if isinstance(result, Tensor) and result.numel() == 1:
        result = result.item()
    if isinstance(result, numbers.Real) and not isinstance(result, bool):
        value = float(result)
        return _judge(value, None, None, None)
    values, residuals = getattr(result, "values", None), getattr(result, "residuals", None)
    if values is None or residuals is None or callable(values):
        raise TypeError(
            f"{caller}: eigenvalue: expected it to return a number or a result with values and residuals, "
            f"got {type(result).__name__}"
        )
    products = getattr(result, "products", None)
    products = None if products is None else int(products)
    if len(values) == 0:
        return Reading(None, None, False, products, "eigenvalue not converged")
    value, residual = float(values[0]), float(residuals[0])
    converged = getattr(result, "converged", None)
    if converged is None:
        verdict = residual <= _TOLERANCE * abs(value)
    else:
        verdict = bool(converged[0]) and math.isfinite(residual)
    return _judge(value, residual, verdict, products)


def _judge(value: float, residual: float | None, converged: bool | None, products: int | None) -> Reading:
    problem = None
    if not math.isfinite(value):
        problem = "eigenvalue not finite"
    elif converged is False:
        problem = "eigenvalue not converged"
    elif value <= 0:  # a fall to a part of it says something only of what is positive
        problem = "eigenvalue not positive"
    if residual is not None and not math.isfinite(residual):
        residual = None
    return Reading(value if math.isfinite(value) else None, residual, converged, products, problem)
