"""What the spectral methods ask of an operator, and the adapter that checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.finite import all_finite


@runtime_checkable
class SymmetricOperator(Protocol):
    """Anything square with `shape` and `@` that equals its own transpose.

    A torch matrix is one, and so is every operator of `kronfac.operators`. `operator @ V` gets a tensor (n,) or (n, k)
    and returns one of the same shape. Optional attributes: `dtype` and `device` of the vectors (default: torch's
    default dtype, the CPU).
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, n)."""
        ...

    def __matmul__(self, vectors: Any, /) -> Any:
        """Product with a vector (n,) or with the columns of a matrix (n, k)."""
        ...


@dataclass(frozen=True, eq=False)
class CheckedOperator:
    """An operator whose facts were checked once, and whose products are checked each time.

    Attributes:
        operator: what `@` is called on.
        size: n.
        dtype: of the vectors, float32 or float64.
        device: of the vectors.
        caller: the public function that error messages name.
    """

    operator: Any
    size: int
    dtype: torch.dtype
    device: torch.device
    caller: str

    @property
    def epsilon(self) -> float:
        """Unit round-off of the vectors' type (distance from 1 to the next number)."""
        return float(torch.finfo(self.dtype).eps)

    def matvec(self, vector: Tensor) -> Tensor:
        """Product with one vector (n,); the result is the caller's own to overwrite."""
        return self._product(vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Product with the columns of a matrix (n, k)."""
        return self._product(vectors)

    def _product(self, vectors: Tensor) -> Tensor:
        product = self.operator @ vectors
        if not isinstance(product, Tensor) or product.shape != vectors.shape:
            got = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(
                f"{self.caller}: op @ v: expected a tensor of shape {tuple(vectors.shape)}, got {got}; "
                "the operator must map a tensor (n,) or (n, k) to one of the same shape"
            )
        if not all_finite(product):
            raise ValueError(f"{self.caller}: op @ v is not finite; the operator overflows or contains NaN or infinity")
        product = product.detach().to(dtype=self.dtype, device=self.device)
        # An operator may return its argument (the identity does); Lanczos overwrites what it gets.
        return product.clone() if product.data_ptr() == vectors.data_ptr() else product


def check_operator(operator: SymmetricOperator | np.ndarray[Any, Any], caller: str) -> CheckedOperator:
    """Check that `operator` can serve as a symmetric operator and find the type of its vectors.

    Args:
        operator: a symmetric operator, torch matrix or numpy matrix (n, n).
        caller: the public function that error messages name.

    Returns:
        The operator with its facts. Vectors are float64 for a float64 operator and float32 for all narrower types.

    Raises:
        TypeError: no `shape` and `@`, or not of a real floating-point type.
        ValueError: not square, empty, an operator that says it is not symmetric, or a dense matrix that is not
            symmetric or not finite.
    """
    if isinstance(operator, np.ndarray):
        operator = torch.from_numpy(np.ascontiguousarray(operator))
    if not (hasattr(operator, "shape") and hasattr(operator, "__matmul__")):
        raise TypeError(
            f"{caller}: op: expected an operator with `shape` and `@` (kronfac.operators, a torch matrix), "
            f"got {type(operator).__name__}"
        )
    if getattr(operator, "symmetric", True) is False:
        raise ValueError(
            f"{caller}: op: expected a symmetric operator, got {operator!r}, which is not: a product of symmetric "
            "operators is symmetric only where they commute. Products like b @ a @ b are symmetric, and "
            "(op + op.mT) / 2 is the symmetric part; kronfac.linalg.lsmr solves systems with any operator"
        )
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{caller}: op: expected a square operator (n, n) with n >= 1, got shape {shape}")
    dtype = getattr(operator, "dtype", None)
    if dtype is None:
        dtype = torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"{caller}: op: its dtype is {dtype!r}, not a torch dtype; the operator must take and return torch tensors"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"{caller}: op: expected a real floating-point type, got {dtype}; convert it with .to()")
    device = torch.device(getattr(operator, "device", None) or "cpu")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(operator, Tensor):
        matrix = operator.detach().to(work)
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{caller}: op: the matrix contains NaN or infinity")
        asymmetry = float((matrix - matrix.mT).abs().max())
        # Looser than round-off: X @ X.T is symmetric only up to the order of its sums.
        if asymmetry > 1e3 * float(torch.finfo(work).eps) * float(matrix.abs().max()):
            raise ValueError(
                f"{caller}: op: the matrix is not symmetric (largest |a_ij - a_ji| is {asymmetry:.3g}); "
                "symmetrise it with (a + a.mT) / 2 if the difference is round-off"
            )
        operator = matrix
    return CheckedOperator(operator, shape[0], work, device, caller)
