"""Loads the compiled operators; importing this module registers `torch.ops.kronfac`."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch

LOADED: dict[str, str] = {}
"""Compiled libraries in use: name to file."""
FAILED: dict[str, str] = {}
"""Optional libraries that are there and do not load: name to reason."""


def _load(name: str, *, required: bool) -> None:
    # find_spec, not a path beside this file: in an editable install the library lies elsewhere than the sources.
    spec = find_spec(f"{__package__}.{name}")
    if spec is None or spec.origin is None:
        if required:
            raise ImportError(
                f"kronfac: the compiled library {name} is missing; reinstall with "
                "`pip install --force-reinstall kronfac` (from a checkout: `pip install -e . --no-build-isolation`)"
            )
        return
    try:
        torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
    except OSError as error:
        if not required:
            # What runs on the CPU needs nothing of this library; a tensor on the GPU gets the dispatcher's error.
            FAILED[name] = str(error)
            warnings.warn(
                f"kronfac: no operators for CUDA tensors: {spec.origin} does not load into torch {torch.__version__}: "
                f"{error}. It needs torch 2.11 or later; upgrade torch or rebuild kronfac against the one installed",
                stacklevel=2,
            )
            return
        raise ImportError(
            f"kronfac: {spec.origin} does not load into torch {torch.__version__}: {error}. "
            "It needs torch 2.11 or later; upgrade torch or rebuild kronfac against the one installed"
        ) from error
    LOADED[name] = spec.origin


_load("_ops", required=True)
# Without CUDA in torch the library's own dependencies cannot be resolved, and nothing could call it.
if torch.version.cuda is not None:
    _load("_ops_cuda", required=False)
