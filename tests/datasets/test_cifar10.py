from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from kronfac.datasets import DatasetError, load
from kronfac.datasets.cifar10 import read_binary_batch, read_python_batch
from tests.datasets.files import cifar_batch, write_cifar_python


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_python_version(tmp_path: Path, below: str) -> None:
    write_cifar_python(tmp_path / below)
    data = load("cifar10", tmp_path)
    assert (len(data.train), len(data.test), data.input_shape, data.classes) == (30, 6, (3, 32, 32), 10)
    assert torch.allclose(data.train.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(data.train.inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    pixels, labels = cifar_batch(6, seed=1)  # data_batch_2
    assert data.train.targets[6:12].tolist() == labels
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (data.mean, data.std))
    raw = data.train.inputs[6:12].double() * std + mean
    assert torch.allclose(raw, torch.from_numpy(pixels.astype(np.float64)).view(6, 3, 32, 32), atol=1e-3)


def test_binary_version_equals_python_version(tmp_path: Path) -> None:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    python, binary = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-10-batches-bin"
    binary.mkdir()
    write_cifar_python(python, count=6)
    for name in names:
        images, labels = read_python_batch(python / name)
        table = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(6, -1)], axis=1)
        (binary / f"{name}.bin").write_bytes(table.tobytes())
        back_images, back_labels = read_binary_batch(binary / f"{name}.bin", records=6)
        assert np.array_equal(back_images, images)
        assert np.array_equal(back_labels, labels)
    with pytest.raises(DatasetError, match=r"data_batch_1\.bin: truncated: 10000 records need 30730000 bytes"):
        load("cifar10", binary)  # the published files have 10,000 records each


def test_pickle_of_python_2(tmp_path: Path) -> None:
    # What Python 2 and its numpy wrote: str for bytes, and the private function under its old module name.
    content = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + bytes(range(256)) * 12 + b"tbU\x06labels]q\x08K\x03au."
    )
    (tmp_path / "batch").write_bytes(content)
    images, labels = read_python_batch(tmp_path / "batch")
    assert images.shape == (1, 3, 32, 32)
    assert np.array_equal(images.reshape(-1), np.arange(3072) % 256)
    assert labels.tolist() == [3]


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": _Attack(), b"labels": [1]}, protocol=protocol))
    with pytest.raises(DatasetError, match=r"batch: refused, it asks for posix\.mkdir"):
        read_python_batch(tmp_path / "batch")
    assert not (tmp_path / "harmed").exists()


def test_pickle_of_objects_inside_an_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": np.array([[], None], dtype=object)}, protocol=2))
    with pytest.raises(DatasetError, match="refused"):
        read_python_batch(tmp_path / "batch")


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99])
def test_truncated_pickle(tmp_path: Path, fraction: float) -> None:
    write_cifar_python(tmp_path)
    path = tmp_path / "data_batch_3"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(DatasetError, match="data_batch_3: truncated or damaged pickle") as error:
        load("cifar10", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary, got list"),
        ({b"labels": [1]}, "'data' should be a uint8 array"),
        ({b"data": np.zeros((2, 100), np.uint8), b"labels": [1, 2]}, r"got uint8 \(2, 100\)"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "2 images but 1 labels"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": ["a", "b"]}, "'labels' should be a list of integers"),
    ],
)
def test_wrong_contents(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DatasetError, match=message):
        read_python_batch(tmp_path / "batch")


def test_label_out_of_range(tmp_path: Path) -> None:
    write_cifar_python(tmp_path)
    content = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DatasetError, match=r"test label -1 is outside 0\.\.9"):
        load("cifar10", tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        load("cifar10", tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="unpack the archive first"):
        load("cifar10", tmp_path)
    write_cifar_python(tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(DatasetError, match="test_batch not found"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("change", [-30_730_000 // 2, -1, 1])
def test_binary_of_the_wrong_size(tmp_path: Path, change: int) -> None:
    path = tmp_path / "data_batch_1.bin"
    with path.open("wb") as file:
        file.truncate(30_730_000 + change)  # sparse: nothing is written
    with pytest.raises(DatasetError, match="truncated" if change < 0 else "too long"):
        load("cifar10", tmp_path)
