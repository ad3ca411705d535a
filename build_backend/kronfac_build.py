"""PEP 517 backend: scikit-build-core, plus finding the torch to build against.

Listing torch as a build requirement makes every isolated build download it (several gigabytes with the CUDA packages),
although the environment being installed into has it already. Inside pip's isolation `importlib` no longer sees that
environment but `sysconfig` still points at it. So: look there, hand the path to CMake, and ask for torch only where
there is none.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend

TORCH_REQUIREMENT = "torch>=2.11"
_ROOT_VARIABLE = "KRONFAC_TORCH_ROOT"


def find_torch() -> Path | None:
    """Return the directory of the torch package to build against, or None."""
    named = os.environ.get(_ROOT_VARIABLE)
    if named:
        return Path(named)
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    for scheme in ("purelib", "platlib"):
        candidate = Path(sysconfig.get_path(scheme)) / "torch"
        if (candidate / "include" / "torch" / "csrc" / "stable").is_dir():
            return candidate
    return None


def _fail(message: str) -> None:
    print(f"\nkronfac: {message}\n", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _prepare() -> None:
    root = find_torch()
    if root is None:
        _fail(f"building needs torch, and none is installed here; run `pip install '{TORCH_REQUIREMENT}'` first")
    elif not (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        _fail(
            f"{root} has no stable-ABI headers (torch 2.11 or later is needed); run "
            f"`pip install -U '{TORCH_REQUIREMENT}'`, or point {_ROOT_VARIABLE} at the torch package to build against"
        )
    compiler = os.environ.get("CXX", "").split()
    if compiler and shutil.which(compiler[0]) is None:
        _fail(f"CXX={os.environ['CXX']}: no such compiler; install it or unset CXX")
    if not compiler and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        _fail("building needs a C++20 compiler and found none; install g++ (Debian: apt install g++) or set CXX")
    os.environ[_ROOT_VARIABLE] = str(root)


def _requires(listed: list[str]) -> list[str]:
    return listed if find_torch() is not None else [*listed, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Scikit-build-core's requirements, and torch where none is installed."""
    return _requires(_backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Scikit-build-core's requirements, and torch where none is installed."""
    return _requires(_backend.get_requires_for_build_editable(config_settings))


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Scikit-build-core's requirements; an sdist compiles nothing."""
    return _backend.get_requires_for_build_sdist(config_settings)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel after checking for torch and a compiler."""
    _prepare()
    return _backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build the editable wheel after checking for torch and a compiler."""
    _prepare()
    return _backend.build_editable(wheel_directory, config_settings, metadata_directory)


build_sdist = _backend.build_sdist
