"""The IDX format of MNIST (http://yann.lecun.com/exdb/mnist): a header, then big-endian values in C order.

Header: two zero bytes, a type code, the number of dimensions, then each dimension as a big-endian 32-bit integer.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from kronfac.datasets.dataset import DatasetError

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzip-compressed (told apart by content, not by name).

    Args:
        path: the file.
        ndim: number of dimensions expected.

    Returns:
        uint8 array of the shape in the header.

    Raises:
        DatasetError: not an IDX file, another type or number of dimensions, a size other than the header says.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                return _read(path, raw, ndim)
            with gzip.open(raw) as unpacked:
                return _read(path, cast("IO[bytes]", unpacked), ndim)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DatasetError(f"{path}: truncated or damaged gzip file ({error})") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read(path: Path, file: IO[bytes], ndim: int) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DatasetError(f"{path}: not an IDX file (its first bytes are {magic.hex(' ') or 'missing'})")
    if magic[2] != _UNSIGNED_BYTE or magic[3] != ndim:
        raise DatasetError(
            f"{path}: expected {ndim} dimensions of unsigned bytes (type 0x08), "
            f"got {magic[3]} dimensions of type 0x{magic[2]:02x}"
        )
    header = file.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise DatasetError(f"{path}: truncated inside the header")
    shape = struct.unpack(f">{ndim}I", header)
    expected = math.prod(shape)
    # One byte more than expected tells a longer file apart; the file, not the header, limits what is allocated.
    body = bytearray()
    while len(body) <= expected:
        chunk = file.read(min(1 << 24, expected + 1 - len(body)))
        if not chunk:
            break
        body += chunk
    if len(body) != expected:
        what = "truncated" if len(body) < expected else "longer than its header says"
        got = f"{len(body)}" if len(body) < expected else "more"
        raise DatasetError(f"{path}: {what}: {' x '.join(map(str, shape))} needs {expected} bytes of values, got {got}")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)
