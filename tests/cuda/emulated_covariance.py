"""The GPU's covariance on the CPU: calls of tests/cuda/emulate_covariance.cpp."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.cuda import emulation
from tests.cuda.emulation import TYPES, integers, pointer


def _library() -> Any:
    return emulation.library("emulate_covariance.cpp")


def _arguments(out: Tensor, x: Tensor, bias: bool, decay: float, scale: float) -> tuple[Any, ...]:
    sizes = ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1])
    numbers = ctypes.c_bool(bias), ctypes.c_double(decay), ctypes.c_double(scale)
    return pointer(x), pointer(out), *sizes, integers(*x.stride(), *out.stride()), *numbers


class Tiles(NamedTuple):
    """How tiles were computed."""

    parts: int
    copied: bool


def covariance_(
    out: Tensor, x: Tensor, bias: bool, decay: float, scale: float, *, tensor_cores: bool | None = None
) -> Tiles:
    """`kronfac.ops.covariance_` by tiles; `tensor_cores` says what becomes of float32."""
    if tensor_cores is None:
        tensor_cores = x.dtype in (torch.bfloat16, torch.float16)
    results = integers(0, 0)
    _library().emulate_covariance(
        TYPES[x.dtype], ctypes.c_bool(tensor_cores), *_arguments(out, x, bias, decay, scale), results
    )
    return Tiles(results[0], bool(results[1]))


def covariance_by_products_(
    out: Tensor, x: Tensor, bias: bool, decay: float, scale: float, *, width: int, slots: int, least_rows: int = 16
) -> list[int]:
    """The same by products of panels of `width` rows; returns the parts of each, 0 where it goes into `out`."""
    parts = integers(*[-1] * ((x.shape[1] + width - 1) // width))
    shape = integers(width, 8, 8, slots, least_rows)
    _library().emulate_covariance_plan(TYPES[x.dtype], *_arguments(out, x, bias, decay, scale), shape, parts)
    return list(parts)


class Plan(NamedTuple):
    """What the plan for contiguous tensors would be."""

    chosen: bool
    width: int
    entries: int
    parts: list[int]
    operations: float


def plan(m: int, features: int, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The products for x (m, features)."""
    numbers, parts, operations = integers(*[0] * 4), integers(*[0] * 120), ctypes.c_double()
    sizes = ctypes.c_int64(m), ctypes.c_int64(features)
    _library().covariance_plan(TYPES[dtype], *sizes, ctypes.c_bool(bias), numbers, parts, ctypes.byref(operations))
    return Plan(bool(numbers[0]), numbers[2], numbers[3], list(parts)[: numbers[1]], operations.value)


def copies(dtype: torch.dtype, m: int, features: int, strides: tuple[int, int], *, offset: int = 0) -> bool:
    """Whether x of such strides is copied before products on tensor cores; `offset`: of its first byte."""
    function = _library().covariance_copies
    function.restype = ctypes.c_bool
    sizes = ctypes.c_int64(m), ctypes.c_int64(features)
    copied: bool = function(TYPES[dtype], ctypes.c_bool(True), *sizes, integers(*strides), ctypes.c_int64(offset))
    return copied


def copies_are_exact(*, halves: bool, m: int, features: int, row: int) -> bool:
    """Whether the copy unit is asked for each entry of x (m, features), rows `row` apart, once and for nothing else."""
    function = _library().covariance_copies_are_exact
    function.restype = ctypes.c_bool
    exact: bool = function(ctypes.c_bool(halves), ctypes.c_int64(m), ctypes.c_int64(features), ctypes.c_int64(row))
    return exact


def tensor_core_parts(m: int, features: int) -> int:
    """The number of parts that the rows of x (m, features) are cut into."""
    function = _library().covariance_tensor_core_parts
    function.restype = ctypes.c_int64
    parts: int = function(ctypes.c_int64(m), ctypes.c_int64(features))
    return parts


def multiply_add(dtype: torch.dtype, a: Tensor, b: Tensor, total: Tensor) -> None:
    """One instruction: `total` (32, 4) += of fragments a (32, 4) and b (32, 2), int32."""
    _library().emulate_multiply_add(TYPES[dtype], pointer(a), pointer(b), pointer(total))


def load_transposed(matrices: Tensor) -> Tensor:
    """The registers (32, 4) that four matrices (4, 8, 8) of 16-bit integers become."""
    fragments = torch.zeros(32, 4, dtype=torch.int32)
    _library().emulate_load_transposed(pointer(matrices), pointer(fragments))
    return fragments


def tf32_bits(x: float) -> int:
    """The bits of x as the tensor cores get it."""
    function = _library().emulate_tf32_bits
    function.restype = ctypes.c_uint32
    bits: int = function(ctypes.c_float(x))
    return bits
