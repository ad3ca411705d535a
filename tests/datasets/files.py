"""Tiny files in the original formats, written for the tests."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np


def idx_bytes(array: np.ndarray) -> bytes:
    """The IDX encoding of a uint8 array."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(directory: Path, *, compress: bool, train: int = 40, test: int = 20, side: int = 28) -> None:
    """The four files of MNIST with a few random images; class c has a bright row c, so that it can be learned."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(7)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = random.randint(0, 60, (count, side, side)).astype(np.uint8)
        images[np.arange(count), labels] = 250
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            name = f"{prefix}-{kind}-ubyte"
            if compress:
                (directory / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (directory / name).write_bytes(content)


def cifar_batch(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Random pixels (count, 3072) and labels."""
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (count, 3072)).astype(np.uint8), [int(i) for i in random.randint(0, 10, count)]


def write_cifar_python(directory: Path, count: int = 6) -> None:
    """The six pickles of the Python version, in protocol 2 with byte-string keys as the originals."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data, labels = cifar_batch(count, seed)
        content = {b"batch_label": b"of the test", b"labels": labels, b"data": data, b"filenames": [b"a.png"] * count}
        (directory / name).write_bytes(pickle.dumps(content, protocol=2))
