"""CIFAR-10 from its original archives, unpacked: the Python (pickle) or the binary version."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kronfac.datasets.dataset import Dataset, DatasetError, find_file, require_directory, standardised
from kronfac.datasets.safe_pickle import UnsafePickleError, load_arrays

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_BINARY_RECORDS = 10_000


def load_cifar10(data_dir: Path) -> Dataset:
    """Read the five training batches and the test batch.

    Args:
        data_dir: the unpacked `cifar-10-batches-py` or `cifar-10-batches-bin`, or the directory above either.

    Raises:
        DatasetError: missing directory or file, truncated file, a pickle that holds anything but arrays and text.
    """
    require_directory("cifar10", data_dir)
    python = [data_dir, data_dir / "cifar-10-batches-py"]
    binary = [data_dir, data_dir / "cifar-10-batches-bin"]
    if any((directory / "data_batch_1").is_file() for directory in python):
        directories, ending, read = python, "", read_python_batch
    elif any((directory / "data_batch_1.bin").is_file() for directory in binary):
        directories, ending, read = binary, ".bin", read_binary_batch
    else:
        raise DatasetError(
            f"cifar10: no data_batch_1 (Python version) or data_batch_1.bin (binary version) in {data_dir} "
            "or in cifar-10-batches-py, cifar-10-batches-bin below it; unpack the archive first"
        )
    batches = [
        read(find_file("cifar10", directories, [stem + ending]))
        for stem in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    ]
    images = np.concatenate([images for images, _ in batches[:5]])
    labels = np.concatenate([labels for _, labels in batches[:5]])
    return standardised("cifar10", (images, labels), batches[5], classes=10)


def read_python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one pickled batch: a dictionary with b"data" (N, 3072) uint8 and b"labels", a list of N class numbers.

    Returns:
        Images (N, 3, 32, 32) uint8 and labels (N,) int64.
    """
    try:
        batch = load_arrays(path)
    except UnsafePickleError as error:
        raise DatasetError(f"{path}: refused, {error}") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle may raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"{path}: truncated or damaged pickle ({reason})") from None
    if not isinstance(batch, dict):
        raise DatasetError(f"{path}: expected a dictionary, got {type(batch).__name__}")
    data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == _PIXELS):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DatasetError(f"{path}: 'data' should be a uint8 array (N, {_PIXELS}), got {got}")
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise DatasetError(f"{path}: 'labels' should be a list of integers, got {type(labels).__name__}")
    if len(labels) != data.shape[0]:
        raise DatasetError(f"{path}: {data.shape[0]} images but {len(labels)} labels")
    return data.reshape(-1, *_SHAPE), np.asarray(labels, dtype=np.int64)


def read_binary_batch(path: Path, records: int = _BINARY_RECORDS) -> tuple[np.ndarray, np.ndarray]:
    """Read one binary batch: `records` times a label byte and 3072 pixel bytes.

    The format has no header: only the number of records of the published files (10,000) tells a truncated one.

    Returns:
        Images (records, 3, 32, 32) uint8 and labels (records,) int64.
    """
    expected = records * (1 + _PIXELS)
    try:
        size = path.stat().st_size
        if size != expected:
            what = "truncated" if size < expected else "too long"
            raise DatasetError(f"{path}: {what}: {records} records need {expected} bytes, got {size}")
        table = np.fromfile(path, dtype=np.uint8).reshape(records, 1 + _PIXELS)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from None
    return table[:, 1:].reshape(-1, *_SHAPE), table[:, 0].astype(np.int64)
