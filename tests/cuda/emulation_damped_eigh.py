"""Calls tests/cuda/emulate_damped_eigh.cpp on tensors of the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.cuda.emulation import TYPES, integers, library, pointer

SOURCE = "emulate_damped_eigh.cpp"
MOST = 48
"""`kEighMatrices` of csrc/cuda/damped_eigh.h."""

Eigh = tuple[list[Tensor], list[Tensor], Tensor]


@dataclass
class _Batch:
    factors: list[Tensor]
    damping: Tensor
    values: list[Tensor] = field(init=False)
    vectors: list[Tensor] = field(init=False)
    copies: list[Tensor] = field(init=False)
    spectra: list[Tensor] = field(init=False)
    failed: Tensor = field(init=False)
    info: Tensor = field(init=False)
    exponent: Tensor = field(init=False)

    def __post_init__(self) -> None:
        nan = float("nan")
        self.values = [f.new_full((len(f),), nan) for f in self.factors]
        self.vectors = [f.new_full((len(f), len(f)), nan).mT for f in self.factors]
        self.copies = [f.new_full((len(f), len(f)), nan) for f in self.factors]
        self.spectra = [f.new_full((len(f),), nan) for f in self.factors]
        self.failed = torch.zeros(len(self.factors), dtype=torch.int32)
        self.info = torch.full((len(self.factors),), 99, dtype=torch.int32)
        self.exponent = torch.full((len(self.factors),), 99, dtype=torch.int32)

    def run(self, step: int) -> None:
        count = len(self.factors)
        flags = [self.failed[i:] for i in range(count)]
        lists = (self.factors, self.values, self.vectors, self.copies, self.spectra, flags)
        addresses = [tensors[i].data_ptr() for i in range(count) for tensors in lists]
        strides = integers(*(stride for f in self.factors for stride in f.stride()))
        library(SOURCE).emulate_damped_eigh(
            TYPES[self.damping.dtype], step, count, (ctypes.c_void_p * len(addresses))(*addresses), strides,
            integers(*(len(f) for f in self.factors)), pointer(self.damping),
            ctypes.c_int64(self.damping.stride(0) if self.damping.dim() else 0), pointer(self.info),
            pointer(self.exponent),
        )  # fmt: skip


def small_order(shared_memory: int) -> int:
    """Up to which order matrices are solved in so many bytes of shared memory."""
    return int(library(SOURCE).small_order(ctypes.c_int64(shared_memory)))


def shared_memory(n: int) -> int:
    """Bytes of shared memory that a block of threads takes for order n."""
    function: Any = library(SOURCE).jacobi_shared_memory
    function.restype = ctypes.c_int64
    return int(function(n))


def small(factors: list[Tensor], damping: Tensor) -> Eigh:
    """One launch of `kronfac.ops.damped_eigh`: orders of one class."""
    batch = _Batch(factors, damping)
    batch.run(0)
    return batch.values, batch.vectors, batch.info


def large(
    factors: list[Tensor],
    damping: Tensor,
    solve: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh,
    failed: int | None = None,
) -> tuple[Eigh, list[Tensor]]:
    """What surrounds a library, which is `solve`; matrix number `failed` is one it gives up on. Also what it was given.

    Bad damping of a matrix is told in info, as its entries are.
    """
    batch = _Batch(factors, damping)
    batch.run(1)
    given = [copy.clone() for copy in batch.copies]
    for copy, spectrum in zip(batch.copies, batch.spectra, strict=True):
        values, vectors = solve(copy)
        spectrum.copy_(values)
        copy.copy_(vectors.mT)
    if failed is not None:
        batch.failed[failed] = 3
    batch.run(2)
    return (batch.values, batch.vectors, batch.info), given
