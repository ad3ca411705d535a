"""How csrc/cuda/solver.cpp finds cuSOLVER and what it says to it, with a library that prints its calls in its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_cusolver.cpp")
SOURCES = FAKE.parents[2] / "csrc"


def compile_(target: Path, *arguments: str) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *arguments, str(FAKE), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with solver.cpp as a library that depends on a cuBLAS, this cuBLAS and two versions of cuSOLVER."""
    folder = tmp_path_factory.mktemp("solver")
    compile_(folder / "cublas", "-DBLAS", "-Wl,-soname,libfakeblas.so")
    compile_(folder / "cusolver", "-DSOLVER")
    compile_(folder / "old", "-DSOLVER", "-DOLD")
    needed = ["-Wl,--no-as-needed", str(folder / "cublas"), "-ldl"]
    compile_(folder / "caller", f"-I{SOURCES}", str(SOURCES / "cuda" / "solver.cpp"), *needed)
    return folder


def run(parts: Path, folder: Path, release: int, cublas: str, cusolver: str, version: str, **more: str) -> list[str]:
    """What calls print with a cuBLAS of this release and a cuSOLVER in these folders."""
    name = f"libcusolver.so.{release - 1}"
    places = (parts / "cublas", folder / cublas / "libfakeblas.so"), (parts / version, folder / cusolver / name)
    for source, target in places:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder / cublas), "CUBLAS_RELEASE": str(release)} | more
    program = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1]).solve_some()", parts / "caller"]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_beside_cublas(parts: Path, tmp_path: Path) -> None:
    lines = run(parts, tmp_path, 13, "lib", "lib", "cusolver")
    assert lines[:2] == [f"cuSOLVER 12.0.4 ({tmp_path / 'lib'}/)", "1"]

    def calls(context: int, stream: int, type_: int) -> list[str]:
        # Lower triangles, with vectors; the leading dimension is the order.
        common = f"{100 + context} {200 + context} 1 0 128 {type_} 1 128 {type_} 2 {type_}"
        solve = f"solve {common} 4 1000 24 3 5"
        return [f"stream {100 + context} {stream}", f"size {common} 5", "memory 1000", solve, "done"]

    # One context for each device and stream.
    assert lines[2:] == [*calls(0, 7, 0), *calls(0, 7, 1), *calls(1, 8, 0), *calls(2, 7, 0)]

    refused = run(parts, tmp_path, 13, "lib", "lib", "cusolver", REFUSE="1")
    assert [line for line in refused[2:] if not line.startswith(("stream", "size"))] == ["refused"] * 4
    for variable, call in (("FAIL_SOLVE", "cusolverDnXsyevBatched"), ("FAIL_CREATE", "cusolverDnCreate")):
        printed = run(parts, tmp_path, 13, "lib", "lib", "cusolver", **{variable: "1"})
        errors = [line for line in printed if line.startswith("error")]
        assert len(errors) == 4
        assert all(f"cuSOLVER's {call} returned status 3 (cuSOLVER 12.0.4" in error for error in errors)


def test_in_a_folder_of_its_own(parts: Path, tmp_path: Path) -> None:
    lines = run(parts, tmp_path, 12, "cublas/lib", "cusolver/lib", "cusolver")
    assert lines[0].startswith("cuSOLVER 12.0.4 (")
    assert lines[0].endswith("cusolver/lib/)")
    assert lines.count("done") == 4


def test_too_old_for_batches(parts: Path, tmp_path: Path) -> None:
    lines = run(parts, tmp_path, 13, "lib", "lib", "old")
    assert lines[0].endswith("has no batched eigensolver, which came with 11.7.1")
    assert lines[1:] == ["0", *["refused"] * 4]


def test_a_release_that_nobody_has_seen(parts: Path, tmp_path: Path) -> None:
    lines = run(parts, tmp_path, 14, "lib", "lib", "cusolver")
    assert lines == ["no cuSOLVER: torch's cuBLAS is of release 14, expected 12 or 13", "0", *["refused"] * 4]
