"""Small image datasets read from their original files, checked and standardised.

`load("digits")` needs scikit-learn (the data come with it); `load("mnist", data_dir)` and `load("cifar10", data_dir)`
read the files as their authors publish them and never download anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kronfac.datasets.batches import Batches
from kronfac.datasets.cifar10 import load_cifar10
from kronfac.datasets.dataset import Dataset, DatasetError, Split
from kronfac.datasets.digits import load_digits
from kronfac.datasets.mnist import load_mnist

_FROM_FILES: dict[str, Callable[[Path], Dataset]] = {"mnist": load_mnist, "cifar10": load_cifar10}

NAMES: tuple[str, ...] = ("digits", *_FROM_FILES)
"""The names `load` knows."""


def load(name: str, data_dir: Path | str | None = None) -> Dataset:
    """Read a dataset by name.

    Args:
        name: one of `NAMES`.
        data_dir: directory that holds the files; required for "mnist" and "cifar10", not used for "digits".

    Raises:
        DatasetError: unknown name, missing directory or file, truncated or inconsistent file. One line each.
    """
    if name == "digits":
        return load_digits()
    if name not in _FROM_FILES:
        raise DatasetError(f"unknown dataset {name!r}: expected one of {', '.join(NAMES)}")
    if data_dir is None:
        raise DatasetError(f"dataset {name!r} is read from files: give the directory that holds them (data_dir)")
    return _FROM_FILES[name](Path(data_dir))


__all__ = ["NAMES", "Batches", "Dataset", "DatasetError", "Split", "load", "load_cifar10", "load_digits", "load_mnist"]
