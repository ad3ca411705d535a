"""The preconditioner of a Newton-type optimizer: given once, or made anew every so many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from kronfac.operators.algebra import ParameterOperator
from kronfac.operators.parameters import ParameterLayout

PreconditionerSource: TypeAlias = "Any | Callable[[], Any] | None"
"""M⁻¹ with `@`, or a callable without arguments that makes one (or a function of a vector)."""

Made: TypeAlias = "tuple[int, Any] | None"
"""The step that a preconditioner was made in, and the preconditioner."""


class Preconditioning:
    """What was given as a preconditioner, and the one in use.

    Args:
        source: an operator with `@`, a callable without arguments that makes one, or None.
        method: what error messages begin with.

    Attributes:
        made: what the last completed step used; `None` before.

    Raises:
        TypeError: neither.
    """

    def __init__(self, source: PreconditionerSource, method: str) -> None:
        if not (source is None or hasattr(source, "__matmul__") or callable(source)):
            raise TypeError(
                f"{method}: preconditioner: expected an operator with `@`, a callable without arguments or None, got "
                f"{type(source).__name__}"
            )
        self._source, self._where = source, f"{method}: preconditioner"
        self.made: Made = None

    def current(self, step: int, every: int, layout: ParameterLayout) -> Made:
        """What a step uses; assign it to `made` when the step is certain.

        Args:
            step: its number.
            every: how many steps one that was made serves.
            layout: of the optimizer's parameters.

        Raises:
            TypeError: the source made something else.
            ValueError: it is over other parameters.
        """
        source = self._source
        if source is None:
            return None
        if hasattr(source, "__matmul__"):
            made = (0, source)
        elif self.made is not None and step - self.made[0] < every:
            return self.made
        else:
            made = (step, source())
        operator, size = made[1], layout.size
        if not (hasattr(operator, "__matmul__") or callable(operator)):
            raise TypeError(f"{self._where}: expected an operator with `@`, got {type(operator).__name__}")
        shape = tuple(getattr(operator, "shape", (size, size)))
        if shape != (size, size):
            raise ValueError(f"{self._where}: expected an operator ({size}, {size}), got shape {shape}")
        if isinstance(operator, ParameterOperator) and operator._layout.shapes != layout.shapes:
            raise ValueError(
                f"{self._where}: expected an operator over the optimizer's parameters in their order, got one over "
                f"{', '.join(operator.names[:4])}{', ...' if len(operator.names) > 4 else ''}"
            )
        return made
