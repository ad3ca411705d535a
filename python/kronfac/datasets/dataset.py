"""What every reader returns, and the checks and the standardisation they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class DatasetError(ValueError):
    """Data that are missing, truncated or inconsistent; the message is one line."""


@dataclass(frozen=True)
class Split:
    """Examples held in memory.

    Attributes:
        inputs: (N, C, H, W) float32, standardised.
        targets: (N,) int64 class numbers.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.targets.shape[0]

    def head(self, examples: int) -> Split:
        """The first `examples` examples (views, no copy)."""
        return Split(self.inputs[:examples], self.targets[:examples])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split.

    Attributes:
        name: as given to `kronfac.datasets.load`.
        train: the training split.
        test: the test split.
        classes: number of classes.
        mean: what was subtracted, per channel, in units of the raw values (computed from the training split).
        std: what was divided by, per channel.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, (C, H, W)."""
        return tuple(self.train.inputs.shape[1:])


def standardised(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
) -> Dataset:
    """Build a `Dataset` from (images uint8 (N, C, H, W), labels (N,)) pairs.

    Mean and standard deviation are taken per channel over the training split only. One pair per channel and not one per
    pixel: the border pixels of digits never change, and a convolution expects the same units everywhere.
    """
    for part, (images, labels) in (("training", train), ("test", test)):
        if images.shape[0] == 0:
            raise DatasetError(f"{name}: the {part} split is empty")
        if images.shape[0] != labels.shape[0]:
            raise DatasetError(f"{name}: {images.shape[0]} {part} images but {labels.shape[0]} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise DatasetError(f"{name}: {part} label {wrong} is outside 0..{classes - 1}")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DatasetError(f"{name}: training images are {train[0].shape[1:]}, test images {test[0].shape[1:]}")
    mean, std = _channel_moments(train[0])
    return Dataset(name, _split(train, mean, std), _split(test, mean, std), classes, tuple(mean), tuple(std))


def _channel_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    # From the histogram of the 256 values: exact, and no float copy of the whole training set.
    values = np.arange(256, dtype=np.float64)
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        means.append(mean)
        stds.append(variance**0.5 if variance > 0 else 1.0)
    return means, stds


def _split(data: tuple[np.ndarray, np.ndarray], mean: list[float], std: list[float]) -> Split:
    images, labels = data
    inputs = torch.from_numpy(images).to(torch.float32)
    shape = (1, -1, 1, 1)
    inputs.sub_(torch.tensor(mean, dtype=torch.float32).view(shape))
    inputs.div_(torch.tensor(std, dtype=torch.float32).view(shape))
    return Split(inputs, torch.from_numpy(labels.astype(np.int64)))


def require_directory(name: str, directory: Path) -> None:
    """Raise `DatasetError` unless `directory` exists."""
    if not directory.exists():
        raise DatasetError(f"{name}: directory {directory} does not exist")
    if not directory.is_dir():
        raise DatasetError(f"{name}: {directory} is not a directory")


def find_file(name: str, directories: list[Path], file_names: list[str]) -> Path:
    """The first existing file among `file_names` in `directories`, in this order.

    Raises:
        DatasetError: none exists; the message names the first file name and the first directory.
    """
    for directory in directories:
        for file_name in file_names:
            if (directory / file_name).is_file():
                return directory / file_name
    raise DatasetError(f"{name}: {file_names[0]} not found in {directories[0]} (looked for {', '.join(file_names)})")
