"""Builds a source of tests/cuda with the machine's C++ compiler and calls it on tensors of the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("emulate.cpp")
INCLUDE = SOURCE.parents[2] / "csrc"
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""As `Element` of csrc/cuda/launch.h."""
ORDERS = ("ascending", "descending", "shuffled")
"""In which the threads of a block run, as `ThreadOrder` of csrc/cuda/block.cuh."""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")

_order = 0


@functools.cache
def _compiled(source: str) -> Any:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "emulate.so"
        command = [compiler, "-std=c++20", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", f"-I{INCLUDE}"]
        command += ["-include", str(SOURCE.with_name("emulation.h"))]
        if os.environ.get("KRONFAC_SANITIZE"):  # `make sanitize`: the runtimes are in this process
            command += SANITIZERS
        file = str(SOURCE.with_name(source))
        result = subprocess.run([*command, file, "-o", str(target)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return ctypes.CDLL(str(target))


def library(source: str = "emulate.cpp") -> Any:
    """The emulated kernels of a source file, compiled anew in each process; skips the test without a compiler."""
    compiled = _compiled(source)
    compiled.emulation_order(_order)
    return compiled


@contextmanager
def threads_in(order: str) -> Iterator[None]:
    """Run the threads of every block in this order, one of `ORDERS`."""
    global _order
    before, _order = _order, ORDERS.index(order)
    try:
        yield
    finally:
        _order = before


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a tensor's first entry."""
    return ctypes.c_void_p(tensor.data_ptr())


def integers(*values: int) -> Any:
    """An array of 64-bit integers."""
    return (ctypes.c_int64 * len(values))(*values)


def second_moment_(out: Tensor, g: Tensor, x: Tensor, bias: bool, decay: float, scale: float) -> int:
    """`kronfac.ops.second_moment_` by the GPU's kernels; returns the number of parts the examples were cut into."""
    function = library().emulate_second_moment
    function.restype = ctypes.c_int64
    sizes = integers(*g.shape, x.shape[2])
    strides = integers(*g.stride(), *x.stride(), *out.stride())
    numbers = ctypes.c_bool(bias), ctypes.c_double(decay), ctypes.c_double(scale)
    parts: int = function(TYPES[g.dtype], pointer(g), pointer(x), pointer(out), sizes, strides, *numbers)
    return parts


def orthogonalize_(w: Tensor, basis: Tensor, passes: int) -> tuple[Tensor, int]:
    """`kronfac.ops.orthogonalize_` by the GPU's kernels, and the number of blocks the columns were cut into."""
    function = library().emulate_orthogonalize
    function.restype = ctypes.c_int64
    coefficients = w.new_full((basis.shape[0],), float("nan"))
    sizes, strides = integers(*basis.shape, passes), integers(*w.stride(), *basis.stride())
    blocks: int = function(TYPES[w.dtype], pointer(w), pointer(basis), pointer(coefficients), sizes, strides)
    return coefficients, blocks


def damped_inverse(factors: list[Tensor], damping: Tensor) -> tuple[list[Tensor], Tensor]:
    """One batch of `kronfac.ops.damped_inverse` by the GPU's kernels, factors by descending order."""
    count = len(factors)
    inverses = [f.new_full(f.shape, float("nan")) for f in factors]
    info = torch.zeros(count, dtype=torch.int32)

    def pointers(tensors: list[Tensor]) -> Any:
        return (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors))

    strides = integers(*(stride for f in factors for stride in f.stride()))
    orders = integers(*(len(f) for f in factors))
    step = ctypes.c_int64(damping.stride(0) if damping.dim() else 0)
    library().emulate_damped_inverse(
        TYPES[damping.dtype], count, pointers(factors), strides, orders, pointers(inverses), pointer(damping), step,
        pointer(info),
    )  # fmt: skip
    return inverses, info


FINISH = {"store": 0, "dot": 1, "divide": 2, "rounded": 3}
"""As `Finish` of csrc/cuda/precondition.h."""


def product(
    finish: str,
    a: list[Tensor],
    b: list[Tensor],
    c: list[Tensor],
    other: list[Tensor],
    damping: Tensor,
    grad: torch.dtype,
    *,
    b_grad: bool = False,
) -> Tensor:
    """One launch of products c = a b for a list of layers; returns their sums (NaN where `finish` makes none)."""
    count, accumulation = len(a), damping.dtype
    dots = torch.full((count,), float("nan"), dtype=accumulation)
    layers = list(zip(a, b, c, other, strict=True))
    pointers = (ctypes.c_void_p * (4 * count))(*(tensor.data_ptr() for layer in layers for tensor in layer))
    strides = integers(*(step for x, y, _, z in layers for tensor in (x, y, z) for step in tensor.stride()))
    sizes = integers(*(size for x, y, _, _ in layers for size in (x.shape[0], y.shape[1], x.shape[1])))
    step = ctypes.c_int64(damping.stride(0) if damping.dim() else 0)
    kind = TYPES[grad], ctypes.c_bool(accumulation == torch.float64), FINISH[finish], ctypes.c_bool(b_grad)
    library().emulate_product(*kind, count, pointers, strides, sizes, pointer(damping), step, pointer(dots))
    return dots
