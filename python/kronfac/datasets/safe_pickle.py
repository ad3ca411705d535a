"""Unpickling of plain containers and numpy arrays, and of nothing else.

A pickle may call any importable function. The reader here resolves only the few names that numpy arrays of bytes need,
so a batch file from an untrusted place can be wrong but cannot run code.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class UnsafePickleError(pickle.UnpicklingError):
    """The pickle asks for a name that arrays and plain containers do not need."""


def load_arrays(path: Path) -> Any:
    """Unpickle a file; byte strings of Python 2 stay `bytes`.

    Raises:
        UnsafePickleError: it refers to anything but numpy arrays.
        Exception: whatever a damaged pickle makes the parser raise.
    """
    with path.open("rb") as file:
        return _Unpickler(file, encoding="bytes").load()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # Python 3 writes bytes in old protocols as _codecs.encode(text, "latin1").
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafePickleError("it encodes something other than latin1 text")
    return text.encode("latin1")


def _reconstruct(subtype: Any, shape: Any, dtype: Any) -> np.ndarray:
    # numpy pickles an array as an empty one whose state follows; anything else is not what numpy writes.
    if subtype is not np.ndarray or shape != (0,):
        raise UnsafePickleError("it builds something other than a plain array")
    return np.empty(0, dtype=np.uint8)


def _dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    if code not in ("u1", b"u1"):
        raise UnsafePickleError("it holds an array of something other than bytes")
    return np.dtype("u1", align=bool(align), copy=bool(copy))


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafePickleError(f"it asks for {module}.{name}") from None
