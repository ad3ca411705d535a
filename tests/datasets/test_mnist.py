from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from kronfac.datasets import DatasetError, load
from tests.datasets.files import idx_bytes, write_mnist


@pytest.mark.parametrize("compress", [False, True])
def test_values(tmp_path: Path, compress: bool) -> None:
    write_mnist(tmp_path, compress=compress)
    data = load("mnist", tmp_path)
    assert (len(data.train), len(data.test), data.input_shape, data.classes) == (40, 20, (1, 28, 28), 10)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.targets.tolist() == [i % 10 for i in range(40)]
    inputs = data.train.inputs.double()
    assert abs(inputs.mean()) < 1e-5
    assert abs(inputs.std(correction=0) - 1) < 1e-5
    raw = inputs * data.std[0] + data.mean[0]
    bright = torch.tensor([i % 10 for i in range(40)])
    assert torch.allclose(raw[torch.arange(40), 0, bright], torch.tensor(250.0, dtype=torch.float64), atol=1e-3)


def test_test_split_uses_the_moments_of_the_training_split(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    before = load("mnist", tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full((20, 28, 28), 9, np.uint8))))
    after = load("mnist", tmp_path)
    assert (after.mean, after.std) == (before.mean, before.std)
    assert torch.allclose(after.test.inputs, torch.tensor((9 - after.mean[0]) / after.std[0]))


def test_directory_of_torchvision(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", compress=False)
    assert len(load("mnist", tmp_path).train) == 40


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"mnist: directory .*nowhere does not exist"):
        load("mnist", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="is not a directory"):
        load("mnist", tmp_path / "file")
    with pytest.raises(DatasetError, match="data_dir"):
        load("mnist")


@pytest.mark.parametrize("kind", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
def test_each_missing_or_truncated_file_is_named(tmp_path: Path, kind: str) -> None:
    write_mnist(tmp_path, compress=True)
    path = tmp_path / f"{kind}-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(DatasetError, match=f"{kind}-ubyte.gz: truncated"):
        load("mnist", tmp_path)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{kind}-ubyte.gz not found in"):
        load("mnist", tmp_path)


def test_inconsistent_files(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(39, np.uint8)))
    with pytest.raises(DatasetError, match="40 training images but 39 labels"):
        load("mnist", tmp_path)
    labels.write_bytes(idx_bytes(np.full(40, 10, np.uint8)))
    with pytest.raises(DatasetError, match=r"training label 10 is outside 0\.\.9"):
        load("mnist", tmp_path)
    write_mnist(tmp_path, compress=False, test=0)
    with pytest.raises(DatasetError, match="test split is empty"):
        load("mnist", tmp_path)


def test_constant_images_do_not_divide_by_zero(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.full((40, 28, 28), 5, np.uint8)))
    assert not load("mnist", tmp_path).train.inputs.any()


def test_unknown_name() -> None:
    with pytest.raises(DatasetError, match="unknown dataset 'svhn': expected one of digits, mnist, cifar10"):
        load("svhn")
