"""What a least-squares solver asks of an operator: products with it and with its transpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronfac.linalg.finite import all_finite


@dataclass(frozen=True, eq=False)
class MatrixFree:
    """A matrix that is known by its products: a Jacobian by `torch.func.jvp` and `torch.func.vjp`, for example.

    Attributes:
        shape: (m, n).
        matvec: callable(v (n,)) -> A v (m,).
        rmatvec: callable(u (m,)) -> Aᵀ u (n,).
        dtype: of the vectors.
        device: of the vectors.
    """

    shape: tuple[int, int]
    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def __matmul__(self, vector: Tensor) -> Tensor:
        """A v."""
        return self.matvec(vector)

    @property
    def mT(self) -> MatrixFree:  # noqa: N802, as torch calls it
        """The transpose."""
        return MatrixFree((self.shape[1], self.shape[0]), self.rmatvec, self.matvec, self.dtype, self.device)


@dataclass(eq=False)
class CheckedPair:
    """An operator and its transpose, whose products are checked and counted.

    Attributes:
        shape: (m, n).
        dtype: of the vectors, float32 or float64.
        device: of the vectors.
        caller: the public function that error messages name.
        products: with either, spent so far.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    caller: str
    forward: Callable[[Tensor], Any]
    backward: Callable[[Tensor], Any]
    products: int = 0

    @property
    def epsilon(self) -> float:
        """Unit round-off of the vectors' type (distance from 1 to the next number)."""
        return float(torch.finfo(self.dtype).eps)

    def matvec(self, vector: Tensor) -> Tensor:
        """A v (m,); the result is the caller's own to overwrite."""
        return self._product(self.forward, vector, self.shape[0], "op @ v")

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Aᵀ u (n,); the result is the caller's own to overwrite."""
        return self._product(self.backward, vector, self.shape[1], "op.mT @ u")

    def _product(self, function: Callable[[Tensor], Any], vector: Tensor, size: int, what: str) -> Tensor:
        self.products += 1
        product = function(vector)
        if not isinstance(product, Tensor) or tuple(product.shape) != (size,):
            got = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(f"{self.caller}: {what}: expected a tensor of shape ({size},), got {got}")
        if not all_finite(product):
            raise ValueError(f"{self.caller}: {what} is not finite; the operator overflows or contains NaN or infinity")
        product = product.detach().to(dtype=self.dtype, device=self.device)
        return product.clone() if product.data_ptr() == vector.data_ptr() else product


def check_pair(operator: Any, caller: str) -> CheckedPair:
    """Find the products with an operator and with its transpose.

    Args:
        operator: a torch or numpy matrix, a scipy sparse matrix or LinearOperator, an operator of `kronfac.operators`,
            a `MatrixFree`, or any object with `shape` (m, n), `@` on torch vectors, and `rmatvec(u)` or `mT`.
        caller: the public function that error messages name.

    Returns:
        The pair. Vectors are float64 for a float64 operator and float32 for all narrower types.

    Raises:
        TypeError: no `shape` and products, no transpose, or not of a real floating-point type.
        ValueError: not two-dimensional, empty, or a dense matrix that is not finite.
    """
    if type(operator).__module__.partition(".")[0] == "scipy":
        operator = _from_scipy(operator)
    elif isinstance(operator, np.ndarray):
        operator = torch.from_numpy(np.ascontiguousarray(operator))
    if not (hasattr(operator, "shape") and hasattr(operator, "__matmul__")):
        raise TypeError(
            f"{caller}: op: expected an operator with `shape`, `@` and `mT` (a matrix, kronfac.linalg.MatrixFree, a "
            f"scipy LinearOperator), got {type(operator).__name__}"
        )
    shape = tuple(operator.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{caller}: op: expected shape (m, n) with m, n >= 1, got {shape}")
    dtype = getattr(operator, "dtype", None) or torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{caller}: op: expected a real floating-point torch type, got {dtype}")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    device = torch.device(getattr(operator, "device", None) or "cpu")
    if isinstance(operator, Tensor):
        operator = operator.detach().to(work)
        if operator.layout == torch.strided and not bool(torch.isfinite(operator).all()):
            raise ValueError(f"{caller}: op: the matrix contains NaN or infinity")
    return CheckedPair((shape[0], shape[1]), work, device, caller, operator.__matmul__, _transpose(operator, caller))


def _transpose(operator: Any, caller: str) -> Callable[[Tensor], Any]:
    own = getattr(operator, "rmatvec", None)
    if callable(own):
        return own  # type: ignore[no-any-return]
    transposed = getattr(operator, "mT", None)
    if transposed is None or not hasattr(transposed, "__matmul__"):
        raise TypeError(
            f"{caller}: op: {type(operator).__name__} has products but no transpose: expected `rmatvec(u)` or `mT`; "
            "wrap both in kronfac.linalg.MatrixFree, or use minres where it is symmetric"
        )
    return transposed.__matmul__  # type: ignore[no-any-return]


def _from_scipy(operator: Any) -> MatrixFree:
    """A scipy operator on torch vectors."""
    from scipy.sparse.linalg import aslinearoperator

    wrapped = aslinearoperator(operator)
    # Matrices of integers, as sparse ones of scipy often are, act on float64 vectors.
    own = np.dtype(np.float64 if wrapped.dtype is None or wrapped.dtype.kind in "biu" else wrapped.dtype)
    dtype = torch.from_numpy(np.empty(0, own)).dtype

    def on_numpy(function: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
        return lambda vector: torch.from_numpy(np.ascontiguousarray(function(vector.cpu().numpy())))

    shape = (int(wrapped.shape[0]), int(wrapped.shape[1]))
    return MatrixFree(shape, on_numpy(wrapped.matvec), on_numpy(wrapped.rmatvec), dtype)
