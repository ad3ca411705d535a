"""What a record is about: the device, the software, the sources."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.process import ROOT


class UnusableError(Exception):
    """There is nothing to check with; one line."""


def require_gpu() -> None:
    """Raise `UnusableError` where no CUDA tensor can be made."""
    try:
        import torch
    except ImportError as error:
        raise UnusableError(f"torch does not import ({error}); run with a Python that has torch with CUDA") from None
    if torch.version.cuda is None:
        raise UnusableError(f"torch {torch.__version__} is built without CUDA; run with a Python whose torch has it")
    if not torch.cuda.is_available():
        raise UnusableError(
            f"torch {torch.__version__} sees no GPU; is there one, with a driver for CUDA {torch.version.cuda}?"
        )
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        raise UnusableError(f"{torch.cuda.get_device_name()} does not compute: {str(error).splitlines()[0]}") from None


def facts() -> dict[str, Any]:
    """Device, driver and versions; None for what cannot be found out."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "nvcc": _nvcc_release(),
        "torch": torch.__version__,
        "kronfac": _kronfac_version(),
        "commit": commit(),
        "sources": sources(),
    }


def about() -> list[str]:
    """What the times of a process are about: device and sources."""
    import torch

    return [torch.cuda.get_device_name(0), sources()]


def nvcc() -> str | None:
    """The CUDA compiler, on the path or where it is usually installed."""
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return named or (str(usual) if usual.is_file() else None)


def _nvcc_release() -> str | None:
    compiler = nvcc()
    said = None if compiler is None else _output(compiler, "--version")
    found = re.search(r"release [\d.]+, V([\d.]+)", said or "")
    return found[1] if found else None


def _kronfac_version() -> str | None:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def commit() -> str | None:
    """The revision, with `+` where files that git knows differ from it; a copy of the tree may name it."""
    revision = _output("git", "rev-parse", "HEAD")
    if revision is None:
        return os.environ.get("KRONFAC_COMMIT")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return revision + ("+" if changes else "")


def sources() -> str:
    """A digest of what is compiled and run: records of different sources are never joined."""
    digest = hashlib.sha256()
    for folder in ("csrc", "python", "cmake", "tests/ops", "tests/cuda", "tests/optim", "bench/gpu_check"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".cmake"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    digest.update((ROOT / "CMakeLists.txt").read_bytes())
    return digest.hexdigest()[:16]


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
