"""Products of a matrix over the parameters of a model with vectors, in all the forms that vectors come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from kronfac.operators.parameters import ParameterLayout

Parts = TypeVar("Parts", bound="list[Tensor] | tuple[Tensor, ...]")

# Columns of the identity per call when an operator is written out.
_DENSE_COLUMNS = 64


class VectorProducts(ABC):
    """What every operator does with vectors; `kronfac.operators.ParameterOperator` is for use.

    Attributes:
        names: the parameters it acts on, as in `model.named_parameters()`.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._origin: object = object()  # what its blocks are recognised by
        self.names = layout.names

    @property
    @abstractmethod
    def label(self) -> str:
        """What it is, in a word or as a formula."""

    @property
    def caller(self) -> str:
        """What error messages begin with."""
        return f"kronfac.operators: {self.label}"

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n) with n the number of entries of the chosen parameters."""
        return (self._layout.size, self._layout.size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vectors: float64 if a chosen parameter is float64, else float32."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors: that of the first chosen parameter."""
        return self._layout.device

    @property
    def symmetric(self) -> bool:
        """Whether it equals its transpose; what needs that refuses an operator that does not."""
        return True

    @property
    def mT(self) -> VectorProducts:  # noqa: N802, as torch calls it
        """The transpose; a symmetric operator is its own."""
        return self

    @abstractmethod
    def _multiply(self, rows: Tensor) -> Tensor:
        """Products with vectors that are the rows of a contiguous matrix (k, n), as rows."""

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, vectors: Parts) -> list[Tensor]: ...

    def __matmul__(self, vectors: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor | list[Tensor]:
        """Multiply with a vector (n,), with the columns of a matrix (n, k), or with tensors shaped like the parameters.

        Several columns cost less than as many products: they share one pass over the data.

        Raises:
            TypeError: not tensors of the operator's type.
            ValueError: wrong shape or device, changed data, or a product that is not finite.
        """
        if isinstance(vectors, list | tuple):
            flat = self._flatten(vectors)
            return self._layout.split(self._multiply(flat[None])[0], vectors)
        self._check(vectors)
        rows = vectors.detach()
        rows = rows[None] if rows.ndim == 1 else rows.mT
        product = self._multiply(rows.contiguous())
        return product[0] if vectors.ndim == 1 else product.mT

    def release(self) -> None:  # noqa: B027, most keep nothing
        """Free what is kept between products; the next one makes it anew."""

    def to_dense(self) -> Tensor:
        """Write the matrix out, (n, n): for small n, at the cost of n products. Symmetric up to round-off."""
        identity = torch.eye(self._layout.size, dtype=self.dtype, device=self.device)
        starts = range(0, self._layout.size, _DENSE_COLUMNS)
        return torch.cat([self @ identity[:, first : first + _DENSE_COLUMNS] for first in starts], dim=1)

    def to_scipy(self) -> Any:
        """Wrap as a `scipy.sparse.linalg.LinearOperator` on numpy vectors of the same type.

        Raises:
            ImportError: scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError(f"{self.caller}: to_scipy: needs scipy; install it with `pip install scipy`") from error

        def multiply(operator: VectorProducts, vectors: Any) -> Any:
            # A copy: scipy hands over read-only and strided arrays.
            columns = torch.tensor(vectors, dtype=self.dtype, device=self.device)
            return (operator @ columns.reshape(self._layout.size, -1)).cpu().numpy().reshape(vectors.shape)

        def forward(vectors: Any) -> Any:
            return multiply(self, vectors)

        def backward(vectors: Any) -> Any:
            return multiply(self.mT, vectors)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
        )

    def __repr__(self) -> str:
        """What it is, its size, type and device."""
        return f"<{self.label} operator {self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device}>"

    def _check(self, vectors: Any) -> None:
        where = f"{self.caller} @ v"
        size = self._layout.size
        if not isinstance(vectors, Tensor):
            hint = "; use op.to_scipy() for numpy arrays" if type(vectors).__module__ == "numpy" else ""
            raise TypeError(f"{where}: v: expected a tensor, got {type(vectors).__name__}{hint}")
        if vectors.dtype != self.dtype:
            raise TypeError(f"{where}: v: expected {self.dtype}, got {vectors.dtype}; convert with v.to(op.dtype)")
        if vectors.ndim not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(f"{where}: v: expected shape ({size},) or ({size}, k), got {tuple(vectors.shape)}")
        if vectors.device != self.device:
            raise ValueError(f"{where}: v: expected a tensor on {self.device}, got {vectors.device}")

    def _flatten(self, parts: Sequence[Any]) -> Tensor:
        where = f"{self.caller} @ v"
        shapes = [tuple(shape) for shape in self._layout.shapes]
        got = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if got != shapes:
            raise ValueError(f"{where}: v: expected tensors of the parameters' shapes {shapes}, got {got}")
        for part in parts:
            if not part.dtype.is_floating_point:
                raise TypeError(f"{where}: v: expected floating-point tensors, got {part.dtype}")
        return torch.cat([part.detach().reshape(-1).to(self.device, self.dtype) for part in parts])


def check_same_parameters(first: VectorProducts, second: VectorProducts, sign: str) -> None:
    """Refuse operands whose vectors mean different things.

    Args:
        first: left operand.
        second: right operand.
        sign: of the operation.

    Raises:
        TypeError: vectors of different types.
        ValueError: other parameters, shapes or devices.
    """
    where = f"{first.caller} {sign} {second.label}"
    if first.names != second.names:
        only = [sorted(set(a.names) - set(b.names)) for a, b in ((first, second), (second, first))]
        named = [
            f"only the {which} has {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
            for which, names in zip(("first", "second"), only, strict=True)
            if names
        ] or ["they are in another order"]
        raise ValueError(
            f"{where}: expected operators over the same parameters, but {' and '.join(named)}; make both with the "
            "same params=[...], or take blocks()"
        )
    if first._layout.shapes != second._layout.shapes:
        raise ValueError(f"{where}: expected parameters of the same shapes, got those of different models")
    if first.dtype != second.dtype:
        raise TypeError(f"{where}: expected operators of one type, got {first.dtype} and {second.dtype}")
    if first.device != second.device:
        raise ValueError(f"{where}: expected operators on one device, got {first.device} and {second.device}")
