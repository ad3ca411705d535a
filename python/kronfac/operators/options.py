"""What the operators of a loss have in common to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kronfac.operators.data import BatchSize

BATCH_NORMS = ("running", "batch")


@dataclass(frozen=True)
class EngineOptions:
    """Options of `kronfac.operators.hessian`, `ggn` and `fisher`, which document them."""

    reduction: str = "mean"
    batch_size: BatchSize | None = None
    keep_graph: bool | None = None
    chunk_size: int | None = None
    memory_limit: int | None = None
    batch_norm: str = "running"
    dtype: torch.dtype | str | None = None
    distributed: Any = True

    def check(self, caller: str) -> None:
        """Check what can be checked without model and data.

        Raises:
            TypeError, ValueError: an option of the wrong type or out of range.
        """
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'{caller}: reduction: expected "mean" or "sum", got {self.reduction!r}')
        if self.batch_size is not None and not callable(self.batch_size):
            raise TypeError(
                f"{caller}: batch_size: expected a callable (inputs, targets), got {type(self.batch_size).__name__}; "
                "chunk_size= cuts batches into smaller ones"
            )
        check_counts(caller, chunk_size=self.chunk_size, memory_limit=self.memory_limit)
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(
                f"{caller}: batch_norm: expected one of {', '.join(map(repr, BATCH_NORMS))}, got {self.batch_norm!r}"
            )
        if self.dtype is None or self.dtype == "model":
            return
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f'{caller}: dtype: expected a torch.dtype, "model" or None, got {self.dtype!r}')
        if not self.dtype.is_floating_point or self.dtype.itemsize < 2:
            raise ValueError(f"{caller}: dtype: expected torch.float64, float32, bfloat16 or float16, got {self.dtype}")


def check_counts(caller: str, **counts: Any) -> None:
    """Check numbers by name, each None or at least 1.

    Raises:
        TypeError, ValueError: another value.
    """
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{caller}: {name}: expected an integer or None, got {value!r}")
        if value < 1:
            raise ValueError(f"{caller}: {name}: expected at least 1, got {value}")
