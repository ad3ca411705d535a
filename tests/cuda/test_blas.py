"""The calls of cuBLAS, against a library of the same signatures that multiplies on the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kronfac.cli import info
from tests.cuda import emulation
from tests.ops.cases import DTYPES

HERE = Path(__file__).parent
DEFAULT, TF32, NO_REDUCED_REDUCTIONS = 0, 3, 16
"""Math modes of cuBLAS."""


def built(folder: Path, *, with_cublas: bool) -> Any:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    common = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{emulation.INCLUDE}"]
    sources, target = [str(HERE / "emulate_blas.cpp"), str(emulation.INCLUDE / "cuda/blas.cpp")], folder / "blas.so"
    commands = [[*common, *sources, "-o", str(target), "-ldl"]]
    if with_cublas:
        # A dependency, as torch's cuBLAS is: the names are not looked up in the process as a whole.
        fake = folder / "fake_cublas.so"
        commands = [
            [*common, str(HERE / "fake_cublas.cpp"), "-o", str(fake)],
            [*commands[0], "-DWITH_CUBLAS", str(fake), f"-Wl,-rpath,{folder}"],
        ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def blas(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = built(tmp_path_factory.mktemp("blas"), with_cublas=True)
    library.blas_available.restype = library.blas_tf32_allowed.restype = library.blas_run.restype = ctypes.c_bool
    library.kronfac_blas_version.restype = ctypes.c_char_p
    return library


def run(library: Any, a: Any, b: Any, c: Any, numbers: list[int], **options: Any) -> str:
    """Returns the error's message, "" where there is none."""
    error = ctypes.create_string_buffer(256)
    alpha, beta = ctypes.c_double(options.get("alpha", 1.0)), ctypes.c_double(options.get("beta", 0.0))
    count = ctypes.c_int64(options.get("count", 1))
    full = ctypes.c_bool(options.get("full", False))
    good = library.blas_run(count, emulation.integers(*numbers), a, b, c, alpha, beta, full, error)
    assert good == (error.value == b"")
    return error.value.decode()


def column_major(tensor: Tensor, leading: int) -> Tensor:
    """A column-major copy, NaN in what lies between its columns."""
    memory = torch.full((*tensor.shape[:-2], tensor.shape[-1], leading), float("nan"), dtype=tensor.dtype)
    memory[..., : tensor.shape[-2]] = tensor.mT
    return memory


def modes(library: Any) -> list[int]:
    values = (ctypes.c_int * 64)()
    calls: int = library.fake_calls(values)
    return list(values)[:calls]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("batch", ["none", "strided", "pointers"])
def test_arguments_arrive(blas: Any, dtype: torch.dtype, transposed: tuple[bool, bool], batch: str) -> None:
    blas.fake_set(DEFAULT, -1, 13)
    count, (m, n, k) = (1 if batch == "none" else 3), (5, 3, 7)
    result = dtype if dtype == torch.float64 else torch.float32
    a, b = torch.randn(count, m, k).to(dtype), torch.randn(count, k, n).to(dtype)
    c = torch.randn(count, m, n).to(result)
    a_memory = column_major(a.mT if transposed[0] else a, 8)
    b_memory = column_major(b.mT if transposed[1] else b, 9)
    c_memory = column_major(c, 6)
    numbers = [m, n, k, 8, 9, 6, *transposed, emulation.TYPES[dtype], emulation.TYPES[result]]
    numbers += [count, a_memory[0].numel(), b_memory[0].numel(), c_memory[0].numel(), batch == "pointers"]
    memory = [a_memory, b_memory, c_memory]
    if batch == "pointers":
        addresses = [(ctypes.c_void_p * count)(*(part.data_ptr() for part in whole)) for whole in memory]
    else:
        addresses = [emulation.pointer(whole) for whole in memory]
    assert run(blas, *addresses, numbers, alpha=0.5, beta=-2.0) == ""
    expected = 0.5 * a.double() @ b.double() - 2.0 * c.double()
    torch.testing.assert_close(c_memory[..., :m].mT.double(), expected, rtol=1e-5, atol=1e-5)
    assert c_memory[..., m:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pointers", [False, True])
def test_a_batch_beyond_a_grid_goes_in_several_calls(blas: Any, dtype: torch.dtype, pointers: bool) -> None:
    blas.fake_set(DEFAULT, -1, 13)
    count, result = 2 * 65535 + 3, dtype if dtype == torch.float64 else torch.float32
    a, b = torch.randn(count, 2).to(dtype), torch.randn(count, 3).to(dtype)
    c = torch.zeros(count, dtype=result)
    numbers = [1, 1, 2, 1, 2, 1, 0, 0, emulation.TYPES[dtype], emulation.TYPES[result], count, 2, 3, 1, pointers]
    if pointers:
        steps = [(t.data_ptr(), t.stride(0) * t.element_size()) for t in (a, b, c)]
        addresses = [(ctypes.c_void_p * count)(*range(at, at + count * step, step)) for at, step in steps]
    else:
        addresses = [emulation.pointer(t) for t in (a, b, c)]
    assert run(blas, *addresses, numbers) == ""
    assert len(modes(blas)) == 3
    torch.testing.assert_close(c.double(), (a.double() * b[:, :2].double()).sum(1), rtol=1e-5, atol=1e-5)


SQUARE = [2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_precision_follows_torch_or_is_full_and_the_mode_is_put_back(blas: Any) -> None:
    x, y = torch.ones(2, 2), torch.zeros(2, 2)
    pointers = [emulation.pointer(t) for t in (x, x, y)]
    for original in (DEFAULT, TF32, TF32 | NO_REDUCED_REDUCTIONS):
        blas.fake_set(original, -1, 13)
        assert blas.blas_tf32_allowed() == (original != DEFAULT)
        assert run(blas, *pointers, SQUARE, count=2) == ""
        assert run(blas, *pointers, SQUARE, full=True) == ""
        assert modes(blas) == [original, original, DEFAULT]
        assert blas.fake_mode() == original


def test_narrow_results_are_not_reduced_in_their_type(blas: Any) -> None:
    blas.fake_set(TF32, -1, 13)
    x, y = torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)
    assert run(blas, *(emulation.pointer(t) for t in (x, x, y)), [*SQUARE[:8], 2, 2, *SQUARE[10:]]) == ""
    assert modes(blas) == [NO_REDUCED_REDUCTIONS]
    assert blas.fake_mode() == TF32
    assert torch.equal(y, torch.full_like(y, 2))


def test_a_refused_product_is_named_and_the_mode_is_put_back(blas: Any) -> None:
    blas.fake_set(TF32, 1, 13)
    x, y = torch.ones(2, 2), torch.zeros(2, 2)
    error = run(blas, *(emulation.pointer(t) for t in (x, x, y)), SQUARE, count=3, full=True)
    assert error == "kronfac: cublasGemmEx failed: CUBLAS_STATUS_INVALID_VALUE (7)"
    assert modes(blas) == [DEFAULT]
    assert blas.fake_mode() == TF32


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, 0, "k is 0"),
        (3, 1, "lda is less"),
        (4, 1, "ldb is less"),
        (5, 1, "ldc is less"),
        (5, 2**31, "at most 2147483647"),
        (9, 1, "types"),
    ],
)
def test_what_cublas_does_not_take_is_refused(blas: Any, place: int, value: int, message: str) -> None:
    blas.fake_set(DEFAULT, -1, 13)
    numbers = list(SQUARE)
    numbers[place] = value
    assert message in run(blas, None, None, None, numbers)
    assert modes(blas) == []


def test_empty_products_are_left_out(blas: Any) -> None:
    blas.fake_set(DEFAULT, -1, 13)
    for place in (0, 1, 10):
        numbers = list(SQUARE)
        numbers[place] = 0
        assert run(blas, None, None, None, numbers) == ""
    assert modes(blas) == []


def test_found_among_the_dependencies(blas: Any) -> None:
    assert blas.blas_available()
    assert blas.kronfac_blas_version() == b"13.2.5"
    assert info._cublas(blas._name) == "13.2.5"


def test_not_found(tmp_path: Path) -> None:
    library = built(tmp_path, with_cublas=False)
    library.blas_available.restype = library.blas_tf32_allowed.restype = library.blas_run.restype = ctypes.c_bool
    library.kronfac_blas_version.restype = ctypes.c_char_p
    assert not library.blas_available()
    assert not library.blas_tf32_allowed()
    assert library.kronfac_blas_version() == b""
    assert info._cublas(library._name).startswith("not found")
    assert "was not found" in run(library, None, None, None, SQUARE)
