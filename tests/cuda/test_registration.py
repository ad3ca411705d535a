"""No operator is forgotten: sources, the list of what is built, and the library as the loader sees it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kronfac import ops

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "csrc" / "cuda"
HEADERS = ("inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h", "stable/c/shim.h")


def named(pattern: str, *files: Path) -> list[str]:
    return [name for file in files for name in re.findall(pattern, file.read_text(encoding="utf-8"))]


def test_every_operator_is_implemented_once() -> None:
    schemas = named(r'\bdefine\(m, "(\w+)"', ROOT / "csrc" / "ops.cpp")
    assert sorted(schemas) == sorted(ops.__all__)
    for folder, key in ((FOLDER, "CUDA"), (ROOT / "csrc" / "cpu", "CPU")):
        files = sorted(folder.glob("*.cpp"))
        assert sorted(named(r'\bimplement\(m, "(\w+)"', *files)) == sorted(schemas)
        registered = [file for file in files if named(r'\bimplement\(m, "(\w+)"', file)]
        assert named(r"STABLE_TORCH_LIBRARY_IMPL\(kronfac, (\w+), m\)", *registered) == [key] * len(registered)


def test_every_source_is_built() -> None:
    listed = named(r"csrc/cuda/[\w/]+\.(?:cpp|cu)\b", ROOT / "CMakeLists.txt")
    there = [str(file.relative_to(ROOT)) for file in FOLDER.iterdir() if file.suffix in (".cpp", ".cu")]
    assert sorted(listed) == sorted(there)


def built() -> Path:
    spec = find_spec("kronfac._ops_cuda")
    if spec is None or spec.origin is None:
        pytest.skip("no CUDA operators in this build")
    return Path(spec.origin)


def said_by(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols() -> list[str]:
    lines = said_by("nm", "-D", "--undefined-only", str(built())).splitlines()
    return [line.split()[-1] for line in lines if line.split()[0] == "U"]


def test_it_needs_torch_and_nothing_else() -> None:
    """Or the CUDA runtime too, where that is not linked in.

    libtorch.so has no symbols of its own: the linker would drop it, and with it the CUDA half of torch.
    """
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said_by("readelf", "--dynamic", str(built())))
    system = re.compile(r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux[\w-]*)\.so\.\d+$")
    others = {name for name in needed if not system.match(name) and not name.startswith("libcudart.so.")}
    assert others == {"libtorch.so", "libtorch_cpu.so"}


def test_every_symbol_it_wants_is_of_the_stable_abi() -> None:
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    declared = set(named(r"\b((?:aoti_torch|torch)_\w+)\s*\(", *(include / header for header in HEADERS)))
    system = re.compile(r".*@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|(__)?cuda[A-Z]\w*(@.*)?$|_Unwind_Resume.*")
    foreign = [name for name in undefined_symbols() if not system.match(name) and name.split("@")[0] not in declared]
    assert foreign == []


def test_the_library_registers_every_operator(tmp_path: Path) -> None:
    """Loaded by a torch without CUDA, with stand-ins for the few functions that only a CUDA torch has."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    library = built()
    wanted = [name for name in undefined_symbols() if re.match(r"(aoti_torch|torch)_\w*cuda\w*$", name)]
    source, stand_ins = tmp_path / "stand_ins.c", tmp_path / "stand_ins.so"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in wanted))
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(stand_ins)], check=True)
    program = (
        "import ctypes, sys, torch, kronfac\n"
        "if torch.version.cuda is None:\n"
        "    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)\n"
        "    try:\n"
        "        torch.ops.load_library(sys.argv[2])\n"
        "    except OSError as error:\n"
        "        sys.exit(f'not loaded: {error}')\n"
        "for name in kronfac.ops.__all__:\n"
        "    for overload in ('', '.detached'):\n"
        "        if not torch._C._dispatch_has_kernel_for_dispatch_key(f'kronfac::{name}{overload}', 'CUDA'):\n"
        "            sys.exit(f'no kernel for CUDA: {name}{overload}')\n"
    )
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"
    path = os.pathsep.join(filter(None, (os.environ.get("LD_LIBRARY_PATH"), str(toolkit))))
    result = subprocess.run(
        [sys.executable, "-c", program, str(stand_ins), str(library)],
        capture_output=True, text=True, check=False, env=os.environ | {"LD_LIBRARY_PATH": path},
    )  # fmt: skip
    if "libcudart" in result.stderr and "cannot open shared object" in result.stderr:
        pytest.skip("no CUDA runtime on this machine")
    assert result.returncode == 0, result.stderr
