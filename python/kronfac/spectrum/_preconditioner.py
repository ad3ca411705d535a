"""What stands for an inverse in the search for eigenpairs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kronfac.linalg.symmetric import CheckedOperator


def as_function(preconditioner: object, operator: CheckedOperator) -> Callable[[Tensor], Tensor]:
    """A preconditioner as a function of columns (n, j) whose results are checked.

    Args:
        preconditioner: an operator with `shape` and `@`, or a function of columns.
        operator: what it belongs to.

    Raises:
        TypeError: neither.
        ValueError: of another size.
    """
    where = f"{operator.caller}: preconditioner"
    by_product = hasattr(preconditioner, "__matmul__")
    if not (by_product or callable(preconditioner)):
        raise TypeError(
            f"{where}: expected an operator with `@` or a function of columns (n, j), got "
            f"{type(preconditioner).__name__}"
        )
    shape = tuple(getattr(preconditioner, "shape", (operator.size, operator.size)))
    if shape != (operator.size, operator.size):
        raise ValueError(f"{where}: expected shape {(operator.size, operator.size)}, got {shape}")

    def apply(columns: Tensor) -> Tensor:
        result = preconditioner @ columns if by_product else preconditioner(columns)  # type: ignore[operator]
        if not isinstance(result, Tensor) or result.shape != columns.shape or not bool(result.isfinite().all()):
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{where}: expected a finite tensor of shape {tuple(columns.shape)}, got {got}")
        return result.detach().to(columns)

    return apply
