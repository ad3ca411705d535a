"""MNIST from its four original IDX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kronfac.datasets.dataset import Dataset, find_file, require_directory, standardised
from kronfac.datasets.idx import read_idx


def load_mnist(data_dir: Path) -> Dataset:
    """Read `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, gzip-compressed (`.gz`) or plain.

    Files of the same names and format (Fashion-MNIST, KMNIST) are read just as well.

    Args:
        data_dir: directory of the files, or the one above `MNIST/raw`.

    Raises:
        DatasetError: missing directory or file, truncated file, counts that do not agree.
    """
    require_directory("mnist", data_dir)
    return standardised("mnist", _split(data_dir, "train"), _split(data_dir, "t10k"), classes=10)


def _split(data_dir: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    directories = [data_dir, data_dir / "MNIST" / "raw"]

    def find(kind: str, ndim: int) -> np.ndarray:
        # Some archives unpack to names with a dot before "idx".
        stems = [f"{prefix}-{kind}-idx{ndim}-ubyte", f"{prefix}-{kind}.idx{ndim}-ubyte"]
        return read_idx(find_file("mnist", directories, [s + end for s in stems for end in (".gz", "")]), ndim)

    return find("images", 3)[:, None], find("labels", 1)
