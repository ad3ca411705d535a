"""The machine and the software of a measurement, as far as they explain its figures."""

from __future__ import annotations

import os
from typing import Any

from kronfac.cli import info


def describe() -> dict[str, Any]:
    """`kronfac info`, and caches, memory, clock policy, load and the rivals' versions."""
    facts = info.collect()
    for name in ("executable", "libraries"):  # paths of one machine say nothing elsewhere
        facts.pop(name)
    return facts | {
        "caches": _caches(),
        "memory_bytes": _memory(),
        "frequency_governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("KRONFAC_", "OMP_", "MKL_", "OPENBLAS_", "ONEDNN_"))
        },
        "rivals": _rivals(),
    }


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None


def _caches() -> dict[str, str]:
    caches = {}
    for index in range(8):
        base = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        level, kind, size = (_read(f"{base}/{name}") for name in ("level", "type", "size"))
        if level and kind and size:
            caches[f"L{level} {kind.lower()}"] = size
    return caches


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _rivals() -> dict[str, Any]:
    import numpy

    versions: dict[str, Any] = {"numpy": numpy.__version__}
    try:
        import scipy

        versions["scipy"] = scipy.__version__
    except ModuleNotFoundError:
        pass
    try:
        from threadpoolctl import threadpool_info
    except ModuleNotFoundError:
        return versions
    versions["blas"] = [
        {key: pool.get(key) for key in ("internal_api", "version", "architecture")}
        for pool in threadpool_info()
        if pool.get("user_api") == "blas"
    ]
    return versions
