"""What is installed and in use: the facts a bug report needs."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib.util import find_spec
from typing import Any

_NOT_BUILT = "not in this build"


def collect() -> dict[str, Any]:
    """Return versions, instruction set, threads, build facts and loaded libraries as plain data."""
    import numpy
    import torch

    import kronfac
    from kronfac import _host, _library

    return {
        "kronfac": kronfac.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "instruction_set": _host.instruction_set(),
        "instruction_sets_available": _host.instruction_sets(),
        "cpu_features": [name for name, present in _host.cpu_features().items() if present],
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "build": _host.build_facts(),
        "libraries": dict(_library.LOADED) | {"_host": _host.__file__},
        "cuda": _cuda_facts(),
        "executable": sys.executable,
    }


def render(facts: dict[str, Any]) -> str:
    """Lay the facts of `collect` out as aligned lines."""
    lines: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [(f"{key}.{name}", str(item)) for name, item in value.items()]
        elif isinstance(value, list):
            lines.append((key, " ".join(map(str, value)) or "none"))
        else:
            lines.append((key, str(value)))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or platform.machine()


def _found(library: str | None, function: str, otherwise: str) -> str:
    """What the CUDA operators found at run time in this torch, by a function of theirs that returns text."""
    if library is None:
        return "not looked for"
    describe = getattr(ctypes.CDLL(library), function)
    describe.restype = ctypes.c_char_p
    return str(describe().decode()) or otherwise


def _cublas(library: str | None) -> str:
    return _found(library, "kronfac_blas_version", "not found: products by own kernels")


def _cusolver(library: str | None) -> str:
    return _found(library, "kronfac_cuda_solver", "not found")


def _cuda_facts() -> dict[str, Any]:
    import torch

    from kronfac import _library

    present = find_spec("kronfac._ops_cuda") is not None
    if torch.version.cuda is None:
        return {"torch": "built without CUDA", "operators": "in this build, not loaded" if present else _NOT_BUILT}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    state = "loaded" if "_ops_cuda" in _library.LOADED else _NOT_BUILT
    if "_ops_cuda" in _library.FAILED:
        state = f"do not load: {_library.FAILED['_ops_cuda']}"
    return {
        "torch": f"CUDA {torch.version.cuda}",
        "operators": state,
        "cublas": _cublas(_library.LOADED.get("_ops_cuda")),
        "cusolver": _cusolver(_library.LOADED.get("_ops_cuda")),
        "devices": [torch.cuda.get_device_name(index) for index in range(count)] or "none",
    }
